from collections.abc import Sequence
from typing import Any

import pytest

from raysl.errors import DataError
from raysl.sources.splits import (
    choose_split,
    describe_choice,
    folder_layout,
    split_shards,
)


def _layout(*paths: str) -> tuple[str, dict[str, list[str]], list[str], list[str]]:
    def below(folder: str) -> Sequence[str]:
        rest = [path[len(folder) :] for path in paths if path.startswith(folder)]
        return sorted({name.split("/")[0] if "/" in name else "" for name in rest})

    return folder_layout(below)


class TestShards:
    @pytest.mark.parametrize(
        ("paths", "splits"),
        [
            (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], ["train", "test"]),
            (
                [
                    "data/train-00000-of-00001-a1b2.parquet",
                    "data/unsupervised-00000-of-00001.parquet",
                ],
                ["train", "unsupervised"],
            ),
            (["default/train/0000.parquet", "default/val/0000.parquet"], ["train", "validation"]),
            (["imagenet-train-000.tar", "imagenet-val-000.tar"], ["train", "validation"]),
            (["train.parquet", "dev.parquet", "eval.parquet"], ["train", "validation", "test"]),
            (["TRAIN/0.tar", "Testing/0.tar"], ["train", "test"]),
            (["split=train/0.parquet", "split=test/0.parquet"], ["train", "test"]),
            (
                ["test-00000-of-00002.parquet", "validation-00000-of-00002.parquet"],
                ["test", "validation"],
            ),
        ],
    )
    def test_are_told_apart_by_names(self, paths: list[str], splits: list[str]) -> None:
        parts = split_shards(paths)
        assert parts.split_of == splits
        assert sorted(parts.names) == sorted(splits)

    @pytest.mark.parametrize(
        "paths",
        [
            ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"],
            ["cats-00000-of-00001.parquet", "dogs-00000-of-00001.parquet"],
            ["a.parquet", "latest.parquet"],
            ["trained.tar", "validated.tar"],
            ["train-0.tar", "train-1.tar"],
            ["0.parquet", "test.parquet"],
            ["0.tar"],
            [],
        ],
    )
    def test_are_one_set_without_two_splits(self, paths: list[str]) -> None:
        assert split_shards(paths) == ([None] * len(paths), ())

    def test_that_belong_to_none_are_known(self) -> None:
        parts = split_shards(["train/0.tar", "extra/0.tar", "val/0.tar"])
        assert parts.split_of == ["train", None, "validation"]
        assert parts.names == ("train", "validation")


class TestFolders:
    def test_of_imagenet_are_splits_whose_folders_are_classes(self) -> None:
        above, splits, annotations, doubtful = _layout("train/n01/1.JPEG", "val/n01/2.JPEG")
        assert (above, splits) == ("", {"train": ["train"], "validation": ["val"]})
        assert annotations == doubtful == []

    def test_are_found_below_a_chain_of_single_folders(self) -> None:
        above, splits, _, _ = _layout("Data/CLS-LOC/train/a/1.jpg", "Data/CLS-LOC/val/2.jpg")
        assert above == "Data/CLS-LOC/"
        assert list(splits) == ["train", "validation"]

    def test_of_years_are_one_split_and_others_keep_their_names(self) -> None:
        paths = ("train2014/1.jpg", "train2017/1.jpg", "val2017/1.jpg", "unlabeled2017/1.jpg")
        assert _layout(*paths)[1] == {
            "train": ["train2014", "train2017"],
            "validation": ["val2017"],
            "unlabeled2017": ["unlabeled2017"],
        }

    def test_one_called_train_alone_is_a_split(self) -> None:
        assert _layout("train/cat/1.jpg", "train/dog/1.jpg")[1] == {"train": ["train"]}

    def test_two_held_out_ones_are_splits(self) -> None:
        assert list(_layout("val/1.jpg", "test/1.jpg")[1]) == ["validation", "test"]

    @pytest.mark.parametrize(
        "names", [("car", "plane", "train"), ("bullet train", "test tube"), ("cat", "dog")]
    )
    def test_of_classes_are_no_splits(self, names: tuple[str, ...]) -> None:
        assert _layout(*(f"{name}/1.jpg" for name in names))[1] == {}

    def test_that_are_called_like_a_split_among_classes_are_doubtful(self) -> None:
        assert _layout("car/1.jpg", "train/1.jpg").doubtful == ["train"]

    def test_beside_images_that_are_called_masks_are_annotations(self) -> None:
        assert _layout("images/1.png", "masks/1.png").annotations == ["masks"]
        assert _layout("masks/1.png", "cats/1.png").annotations == []

    def test_of_classes_below_one_folder_are_left_alone(self) -> None:
        assert _layout("photos/cat/1.jpg", "photos/dog/1.jpg")[:2] == ("", {})


NAMES: dict[str, Any] = {"where": "x", "key": "data.split"}


class TestChoice:
    names = ("train", "validation", "test", "extra")

    def test_is_for_training_unless_asked(self) -> None:
        assert choose_split(self.names, None, held_out=False, **NAMES) == "train"

    @pytest.mark.parametrize(
        ("asked", "found"),
        [("val", "validation"), ("validation", "validation"), ("Test", "test"), ("extra", "extra")],
    )
    def test_takes_other_words_for_the_same(self, asked: str, found: str) -> None:
        assert choose_split(self.names, asked, held_out=False, **NAMES) == found

    def test_to_test_on_is_validation_then_test_then_training(self) -> None:
        for names, found in ((self.names, "validation"), (("train", "test"), "test")):
            assert choose_split(names, None, held_out=True, **NAMES) == found
        assert choose_split(("train",), None, held_out=True, **NAMES) == "train"

    def test_of_a_single_one_is_that_one(self) -> None:
        assert choose_split(("test",), None, held_out=False, **NAMES) == "test"

    def test_of_none_is_none(self) -> None:
        assert choose_split((), None, held_out=True, **NAMES) is None

    def test_of_one_that_is_not_there_lists_those_that_are(self) -> None:
        with pytest.raises(DataError, match=r"^x: split=dev: .*; existing splits: train, test$"):
            choose_split(("train", "test"), "dev", held_out=False, **NAMES)
        with pytest.raises(DataError, match=r"existing splits: none$"):
            choose_split((), "test", held_out=False, **NAMES)

    def test_without_one_for_training_has_to_be_made(self) -> None:
        with pytest.raises(DataError, match=r"validation, test and none for training; set data"):
            choose_split(("validation", "test"), None, held_out=False, **NAMES)

    def test_is_said_with_what_lies_beside_it(self) -> None:
        line = describe_choice("train", {"train": 1200, "test": 30}, "image", key="data.split")
        assert line == (
            "the split train is read (1,200 images); data.split=NAME reads another one: test (30)"
        )
        assert describe_choice("train", {"train": 2}, "file", key="data.split") == (
            "the split train is read (2 files)"
        )
