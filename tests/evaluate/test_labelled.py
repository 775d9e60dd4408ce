from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from raysl.errors import DataError
from raysl.evaluate.labelled import Labelling, choose_labelled, has_test_set, open_labelled
from raysl.evaluate.probes import FewShotConfig
from raysl.evaluate.protocol import EvaluateConfig, LabelledSets
from raysl.sources.open import open_source
from raysl.sources.source import ArraySource, DataConfig


def made_up(labels: list[int] | None, *, name: str = "made up", seed: int = 0) -> ArraySource:
    n = 50 if labels is None else len(labels)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    if labels is None:
        return ArraySource(name, pixels)
    numbers = np.array(labels, dtype=np.int64)
    return ArraySource(name, pixels, numbers, [f"class {n}" for n in range(max(labels) + 1)])


def few(labels: int) -> FewShotConfig:
    return FewShotConfig(labels_per_class=labels)


def opened(images: Any, *, data: DataConfig | None = None, **settings: Any) -> LabelledSets | None:
    config = EvaluateConfig(**settings)
    data = data or DataConfig(source="somewhere/images")
    return open_labelled(config, data, images, size_px=8, num_threads=1)


def chosen(images: Any, **settings: Any) -> Labelling:
    data = DataConfig(source="somewhere/images")
    return choose_labelled(EvaluateConfig(**settings), data, images)


def write_folder(root: Path, classes: dict[str, int]) -> str:
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            cv2.imwrite(str(root / name / f"{number}.png"), np.full((8, 8, 3), number, np.uint8))
    return str(root)


def rows(sets: LabelledSets | None) -> tuple[list[int], list[int]]:
    assert sets is not None
    return sets.train.rows.tolist(), sets.test.rows.tolist()


class TestBuiltIn:
    def test_digits_are_tested_on_their_own_test_split(self) -> None:
        data = DataConfig(source="digits", limit=300)
        sets = opened(open_source(data, data=data), data=data)
        assert sets is not None
        assert (len(sets.train), len(sets.test)) == (300, 450)  # a limit cuts training images only
        assert (sets.train.source.name, sets.test.source.name) == ("digits/train", "digits/test")
        assert sets.class_names == [str(number) for number in range(10)]
        assert set(sets.test.labels.tolist()) == set(range(10))
        train = {sets.train.image(place).tobytes() for place in range(300)}
        test = [sets.test.image(place).tobytes() for place in range(450)]
        assert sum(image in train for image in test) < 5  # some people write the same 1


class TestHeldOut:
    LABELS = [0, 1, 2, 1, -1, 0] * 10

    def test_a_fifth_of_the_labelled_images_is_held_out_and_none_is_in_both(self) -> None:
        train, test = rows(opened(made_up(self.LABELS)))
        labelled = [row for row, label in enumerate(self.LABELS) if label >= 0]
        assert len(test) == 10
        assert sorted(train + test) == labelled

    def test_is_the_same_every_time(self) -> None:
        assert rows(opened(made_up(self.LABELS))) == rows(opened(made_up(self.LABELS)))

    def test_labels_belong_to_their_rows(self) -> None:
        sets = opened(made_up(self.LABELS))
        assert sets is not None
        for images in (sets.train, sets.test):
            assert images.labels.tolist() == [self.LABELS[row] for row in images.rows]

    def test_more_than_the_most_are_cut_to_a_subset_that_is_always_the_same(self) -> None:
        whole = rows(opened(made_up(self.LABELS)))
        most = {"max_train_images": 12, "max_test_images": 5, "few_shot": few(1)}
        cut = rows(opened(made_up(self.LABELS), **most))
        assert [len(part) for part in cut] == [12, 5]
        assert all(set(part) < set(everything) for part, everything in zip(cut, whole, strict=True))
        assert cut == rows(opened(made_up(self.LABELS), **most))
        assert cut[0] != whole[0][:12]  # a random subset: a folder is sorted by class


class TestGivenTestSource:
    def test_is_taken_whole(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"class 0": 3, "class 1": 4})
        sets = opened(made_up([0, 1] * 10), source=folder)
        assert sets is not None
        assert sets.train.rows.tolist() == list(range(20))
        assert sets.test.labels.tolist() == [0] * 3 + [1] * 4
        assert sets.test.image(5).max() == 2

    def test_of_which_some_classes_are_unknown_is_refused(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"class 0": 1, "dog": 1})
        with pytest.raises(DataError) as caught:
            opened(made_up([0, 1]), source=folder)
        message = str(caught.value)
        assert message.startswith(f"evaluate.source={folder}: 'dog' not among the classes of made ")
        assert "made up: 'class 0', 'class 1'." in message

    def test_that_lacks_a_class_is_numbered_as_the_training_images_are(
        self, tmp_path: Path
    ) -> None:
        folder = write_folder(tmp_path, {"class 1": 2, "class 2": 1})
        sets = opened(made_up([0, 1, 2] * 10), source=folder)
        assert sets is not None
        assert sets.test.labels.tolist() == [1, 1, 2]

    def test_without_labels_is_refused(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "a", {".": 2})
        with pytest.raises(
            DataError, match=r"no labels; put the images into folders, one per class"
        ):
            opened(made_up([0, 1]), source=folder)

    def test_its_images_without_a_label_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They can never be right, so they would lower every accuracy."""
        test = made_up([1, -1, 0, -1, 1], name="test", seed=1)
        monkeypatch.setattr("raysl.evaluate.labelled.open_source", lambda *_, **__: test)
        sets = opened(made_up([0, 1] * 10), source="test")
        assert sets is not None
        assert sets.test.rows.tolist() == [0, 2, 4]
        assert sets.test.labels.tolist() == [1, 0, 1]
        test._labels = np.full(5, -1)
        test.label_advice = "write the class on each image"
        with pytest.raises(
            DataError, match=r"^evaluate\.source=test: no labels; write the class on"
        ):
            opened(made_up([0, 1] * 10), source="test")

    def test_of_one_class_is_told_by_the_name_of_its_folder(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"class 1": 3})
        sets = opened(made_up([0, 1] * 10), source=folder)
        assert sets is not None
        assert sets.test.labels.tolist() == [1, 1, 1]
        assert sets.class_names == ["class 0", "class 1"]

    def test_of_splits_is_the_held_out_one_unless_another_is_named(self, tmp_path: Path) -> None:
        for split, count in (("train", 5), ("val", 2), ("test", 3)):
            write_folder(tmp_path / split, {"class 0": count, "class 1": count})
        sizes = {
            name: len(rows(opened(made_up([0, 1] * 9), source=str(tmp_path), split=name))[1])
            for name in (None, "train", "test")
        }
        assert sizes == {None: 4, "train": 10, "test": 6}

    def test_an_error_names_the_section_of_the_test_images(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"^evaluate\.source={tmp_path}/none: no such"):
            opened(made_up([0, 1]), source=f"{tmp_path}/none")


class TestWithin:
    """Where the training images are no help, the probes are trained within the test images."""

    @pytest.mark.parametrize(
        ("labels", "why"),
        [
            (None, "no labels"),
            ([-1] * 9, "no labels"),
            ([0] * 9, "labels of one class only"),
            ([0, 1, 2], "no labels of its classes"),
        ],
    )
    def test_a_fifth_of_them_tests_and_the_others_train(
        self, tmp_path: Path, labels: list[int] | None, why: str
    ) -> None:
        folder = write_folder(tmp_path, {"ant": 12, "bee": 18})
        source, data = made_up(labels), DataConfig(source="somewhere/images")
        config = EvaluateConfig(source=folder)
        found = choose_labelled(config, data, source)
        assert found.within
        assert found.notes[0].startswith(f"made up has {why}, so that the probes are trained ")
        assert f"within evaluate.source={folder}: 24 of its labelled images" in found.notes[0]
        sets = opened(source, source=folder)
        assert sets is not None
        assert sets.class_names == ["ant", "bee"]
        train, test = rows(sets)
        assert (len(train), len(test)) == (24, 6)
        assert sorted(train + test) == list(range(30))
        assert sets.train.source is sets.test.source is not source
        assert sets.train.labels.tolist() == [int(row >= 12) for row in train]

    def test_one_class_there_measures_nothing(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"ant": 12})
        found = chosen(made_up(None), source=folder)
        assert (found.train, found.test) == (None, None)
        assert "too few labels, so that no accuracy is measured" in found.notes[0]

    def test_there_is_nothing_to_fine_tune_with(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"ant": 12, "bee": 18})
        with pytest.raises(DataError, match=r"^evaluate\.finetune: made up has no labels, so that"):
            opened(made_up(None), source=folder, final=("finetune",))


TWO = {"cat": 6, "dog": 6}


class TestSplits:
    """Splits that lie beside the training images."""

    def write(self, root: Path, **splits: dict[str, int]) -> DataConfig:
        for split, classes in splits.items():
            write_folder(root / split, classes)
        return DataConfig(source=str(root))

    def found(self, data: DataConfig, **settings: Any) -> tuple[Labelling, bool]:
        config, source = EvaluateConfig(**settings), open_source(data, data=data)
        return choose_labelled(config, data, source), has_test_set(config, data, source)

    @pytest.mark.parametrize(
        ("splits", "name"),
        [(("train", "val", "test"), "val"), (("train", "test"), "test"), (("train", "val"), "val")],
    )
    def test_the_validation_split_tests_or_else_the_test_split(
        self, tmp_path: Path, splits: tuple[str, ...], name: str
    ) -> None:
        data = self.write(tmp_path, **dict.fromkeys(splits, TWO))
        found, is_apart = self.found(data)
        assert found.train is not None
        assert found.test is not None
        assert is_apart
        assert (len(found.train.rows), len(found.test.rows)) == (12, 12)
        assert f"/{name}/" in found.test.source.where(0)
        assert len(found.notes) == 1
        split = {"val": "validation", "test": "test"}[name]
        assert found.notes[0].endswith(f"measured on the split {split} (12 labelled images)")

    def test_a_limit_cuts_the_training_images_only(self, tmp_path: Path) -> None:
        data = self.write(tmp_path, train=TWO, val=TWO)
        found, _ = self.found(data.model_copy(update={"limit": 4}), few_shot=few(1))
        assert found.train is not None
        assert found.test is not None
        assert (len(found.train.rows), len(found.test.rows)) == (4, 12)

    @pytest.mark.parametrize(
        ("val", "why"),
        [
            ({".": 6}, "the split validation has no labels"),
            ({"cat": 3, "cow": 3}, "'cow' of the split validation not among the classes"),
        ],
    )
    def test_one_that_does_not_fit_is_named_and_a_fifth_is_held_out(
        self, tmp_path: Path, val: dict[str, int], why: str
    ) -> None:
        data = self.write(tmp_path, train={"cat": 10, "dog": 10}, val=val)
        found, is_apart = self.found(data)
        assert found.train is not None
        assert found.test is not None
        assert not is_apart
        assert (len(found.train.rows), len(found.test.rows)) == (16, 4)
        assert why in found.notes[0]
        assert "a fifth of the labelled training images is held out" in found.notes[0]

    @pytest.mark.parametrize(("asked", "tested"), [("val", "/test/"), ("test", "/val/")])
    def test_the_one_that_is_trained_on_never_tests(
        self, tmp_path: Path, asked: str, tested: str
    ) -> None:
        data = self.write(tmp_path, train=TWO, val=TWO, test=TWO)
        found, _ = self.found(data.model_copy(update={"split": asked}))
        assert found.test is not None
        assert tested in found.test.source.where(0)

    def test_without_another_a_fifth_is_held_out(self, tmp_path: Path) -> None:
        data = self.write(tmp_path, train=TWO, test=TWO)
        for asked in (data, DataConfig(source="digits")):
            found, is_apart = self.found(asked.model_copy(update={"split": "test"}))
            assert found.train is not None
            assert found.test is not None
            assert not is_apart
            assert found.train.source is found.test.source
            assert not set(found.train.rows.tolist()) & set(found.test.rows.tolist())


class TestWhatIsLeftOut:
    """No labels stop a pretraining: what cannot be measured is left out, and a line says so."""

    LABELS = [0, 1, 2, 1, -1, 0] * 10

    def test_the_few_shot_probe_where_a_class_has_too_few(self) -> None:
        found = chosen(made_up(self.LABELS), few_shot=few(11))
        sets = opened(made_up(self.LABELS), few_shot=few(11))
        assert sets is not None
        assert not sets.few_shot
        assert len(found.notes) == 1
        assert found.notes[0].startswith("1 of 3 classes has fewer labelled images for the probes")
        assert "evaluate.few_shot.labels_per_class=11 ('class 2' has" in found.notes[0]
        fewest = int(np.bincount(sets.train.labels).min())
        assert found.notes[0].endswith(f"evaluate.few_shot.labels_per_class={fewest} measures it")
        assert chosen(made_up(self.LABELS), few_shot=few(fewest)).few_shot

    def test_is_not_told_where_the_probe_is_not_asked_for(self) -> None:
        assert chosen(made_up(self.LABELS), few_shot=few(11), final=("knn",)).notes == ()

    def test_classes_of_one_image_are_measured_where_they_can_be(self) -> None:
        found = chosen(made_up([0] * 20 + list(range(1, 11))))
        assert found.train is not None
        assert found.test is not None
        assert not found.few_shot
        unseen = int((~np.isin(found.test.row_labels, found.train.row_labels)).sum())
        assert unseen > 0
        assert f"{unseen} of 6 test images are of classes without training images" in found.notes[0]

    @pytest.mark.parametrize("labels", [[0, 1], [0, 0, 0], [0, 1, -1]])
    def test_all_of_it_where_the_labels_are_too_few(self, labels: list[int]) -> None:
        found = chosen(made_up(labels))
        assert opened(made_up(labels)) is None
        assert len(found.notes) == 1
        assert "no accuracy is measured" in found.notes[0]

    def test_all_of_it_where_most_train_images_are_of_one_class(self) -> None:
        found = chosen(made_up([0, 1] * 10), max_train_images=1)
        assert found.train is None
        assert "1 image would train the probes and 4 test them" in found.notes[0]

    def test_the_line_says_how_a_source_of_this_kind_gets_labels(self) -> None:
        source = made_up(None)
        source.label_advice = "write the class on each image"
        assert chosen(source).notes == (
            "made up has no labels, so that no accuracy is measured; write the class on each image",
        )


@pytest.mark.parametrize("labels", [None, [-1] * 20])
def test_without_labels_there_is_nothing_to_fine_tune_with(labels: list[int] | None) -> None:
    with pytest.raises(DataError, match=r"^evaluate\.finetune: made up has no labels"):
        opened(made_up(labels), final=("finetune",))


@pytest.mark.parametrize("labels", [None, [-1] * 20])
def test_without_labels_there_is_nothing_to_measure(labels: list[int] | None) -> None:
    source = made_up(labels)
    assert opened(source) is None
