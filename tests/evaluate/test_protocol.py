from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

from raysl.errors import DataError
from raysl.evaluate.finetune import FinetuneConfig
from raysl.evaluate.knn import knn_accuracy
from raysl.evaluate.linear import few_shot_accuracy, linear_accuracy
from raysl.evaluate.protocol import (
    EvaluateConfig,
    LabelledSets,
    all_protocols,
    knn_top1,
    open_labelled,
)
from raysl.sources.open import open_source
from raysl.sources.source import ArraySource, DataConfig


def made_up(labels: list[int] | None, *, name: str = "made up", seed: int = 0) -> ArraySource:
    n = 50 if labels is None else len(labels)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    if labels is None:
        return ArraySource(name, pixels)
    numbers = np.array(labels, dtype=np.int64)
    return ArraySource(name, pixels, numbers, [f"class {n}" for n in range(max(labels) + 1)])


def opened(images: Any, *, data: DataConfig | None = None, **settings: Any) -> LabelledSets | None:
    config = EvaluateConfig(**settings)
    data = data or DataConfig(source="somewhere/images")
    return open_labelled(config, data, images, size_px=8, num_threads=1)


def write_folder(root: Path, classes: dict[str, int]) -> str:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
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
        most = {"max_train_images": 12, "max_test_images": 5, "few_shot_labels": 1}
        cut = rows(opened(made_up(self.LABELS), **most))
        assert [len(part) for part in cut] == [12, 5]
        assert all(set(part) < set(everything) for part, everything in zip(cut, whole, strict=True))
        assert cut == rows(opened(made_up(self.LABELS), **most))
        assert cut[0] != whole[0][:12]  # a random subset: a folder is sorted by class

    def test_too_few_labels_for_the_few_shot_probe_are_refused_before_the_training(self) -> None:
        with pytest.raises(
            DataError, match=r"class 'class 2' has \d+ labelled.*few_shot_labels=11"
        ):
            opened(made_up(self.LABELS), few_shot_labels=11)


class TestGivenTestSource:
    def test_is_taken_whole(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"class 0": 3, "class 1": 4})
        sets = opened(made_up([0, 1] * 10), source=folder)
        assert sets is not None
        assert sets.train.rows.tolist() == list(range(20))
        assert sets.test.labels.tolist() == [0] * 3 + [1] * 4
        assert sets.test.image(5).max() == 2

    def test_with_other_classes_is_refused(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"class 0": 1, "dog": 1})
        with pytest.raises(DataError) as caught:
            opened(made_up([0, 1]), source=folder)
        message = str(caught.value)
        assert message.startswith(f"evaluate.source={folder}: classes ['dog'] are not among")
        assert "made up: ['class 0', 'class 1']" in message

    def test_that_lacks_a_class_is_numbered_as_the_training_images_are(
        self, tmp_path: Path
    ) -> None:
        folder = write_folder(tmp_path, {"class 1": 2, "class 2": 1})
        sets = opened(made_up([0, 1, 2] * 10), source=folder)
        assert sets is not None
        assert sets.test.labels.tolist() == [1, 1, 2]

    def test_without_labels_is_refused(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "a", {".": 2})
        with pytest.raises(DataError, match=r"no labels; set evaluate\.label_column"):
            opened(made_up([0, 1]), source=folder)

    def test_its_images_without_a_label_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They can never be right, so they would lower every accuracy."""
        test = made_up([1, -1, 0, -1, 1], name="test", seed=1)
        monkeypatch.setattr("raysl.evaluate.protocol.open_source", lambda *_, **__: test)
        sets = opened(made_up([0, 1] * 10), source="test")
        assert sets is not None
        assert sets.test.rows.tolist() == [0, 2, 4]
        assert sets.test.labels.tolist() == [1, 0, 1]
        test._labels = np.full(5, -1)
        with pytest.raises(DataError, match=r"no labels; set evaluate\.label_column"):
            opened(made_up([0, 1] * 10), source="test")

    def test_with_training_images_that_have_no_labels_is_refused(self) -> None:
        with pytest.raises(DataError) as caught:
            opened(made_up(None), source="digits")
        assert "the training images (made up) have no labels to train a probe with" in str(
            caught.value
        )


@pytest.mark.parametrize("labels", [None, [-1] * 20])
def test_without_labels_there_is_nothing_to_fine_tune_with(labels: list[int] | None) -> None:
    with pytest.raises(DataError, match=r"evaluate\.finetune: the training images \(made up\)"):
        opened(made_up(labels), finetune=FinetuneConfig())


@pytest.mark.parametrize("labels", [None, [-1] * 20])
def test_without_labels_there_is_nothing_to_measure(labels: list[int] | None) -> None:
    source = made_up(labels)
    assert opened(source) is None


class TestProtocols:
    def features(self, sets: LabelledSets) -> list[torch.Tensor]:
        torch.manual_seed(0)
        centers = torch.randn(3, 6)
        return [
            centers[torch.from_numpy(images.labels)] + torch.randn(len(images), 6)
            for images in (sets.train, sets.test)
        ]

    def test_are_the_measures_with_the_settings_of_the_configuration(self) -> None:
        sets = opened(made_up([0, 1, 2] * 30))
        assert sets is not None
        train, test = self.features(sets)
        config = EvaluateConfig(
            knn_k=3,
            knn_temperature=0.5,
            few_shot_labels=2,
            few_shot_draws=4,
            inverse_penalty=0.1,
        )
        labels: list[npt.NDArray[np.int64]] = [sets.train.labels, sets.test.labels]
        arrays = train.numpy(), labels[0], test.numpy(), labels[1]
        few = few_shot_accuracy(*arrays, labels_per_class=2, num_draws=4, inverse_penalty=0.1)
        tensors = train, torch.from_numpy(labels[0]), test, torch.from_numpy(labels[1])
        knn = knn_accuracy(*tensors, k=3, temperature=0.5)
        assert all_protocols(config, sets, train, test) == {
            "knn_top1": knn,
            "linear_top1": linear_accuracy(*arrays, inverse_penalty=0.1),
            "few_shot_top1": few.mean,
            "few_shot_top1_std": few.deviation,
        }
        assert knn_top1(config, sets, train, test) == knn
