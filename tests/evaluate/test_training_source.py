"""Which labels a run sees; a source without a test set has 100 images, 90 of them labelled."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from raysl.errors import DataError
from raysl.evaluate.features import EvalImages
from raysl.evaluate.labelled import open_labelled
from raysl.evaluate.protocol import EvaluateConfig
from raysl.evaluate.training_source import labels_record, open_training_source, seen_part
from raysl.methods.base import MethodConfig
from raysl.methods.distill import DistillConfig
from raysl.methods.simclr import SimCLRConfig
from raysl.methods.supervised import SupervisedConfig
from raysl.sources.labels import hold_out
from raysl.sources.source import ArraySource, DataConfig, Source
from raysl.sources.subset import SubsetSource, whole_source

LABELS = np.where(np.arange(100) % 10 == 9, -1, np.arange(100) % 3)
LABELLED = np.flatnonzero(LABELS >= 0)
HELD_OUT = set(hold_out(LABELLED)[1].tolist())

SUPERVISED = SupervisedConfig()
DISTILL = DistillConfig(distillation_weight=0.5)
NO_LABELS = DistillConfig()
NO_TEST_SET = EvaluateConfig()
TEST_SET = EvaluateConfig(source="elsewhere")


def toy(labels: Any = LABELS) -> ArraySource:
    """Images that are their row's number all over."""
    images = np.arange(100, dtype=np.uint8).repeat(12).reshape(100, 2, 2, 3)
    return ArraySource("toy", images, labels, ["cat", "dog", "cow"])


def part(
    method: MethodConfig,
    labels: dict[str, Any] | None = None,
    *,
    evaluate: EvaluateConfig = NO_TEST_SET,
    source: ArraySource | None = None,
) -> Source:
    data = DataConfig.model_validate({"source": "a/folder", "labels": labels})
    return seen_part(source or toy(), data, evaluate, method)


def rows_of(source: Source) -> list[int]:
    """Rows of the whole source that have a label in a part of it."""
    labels = source.labels()
    assert labels is not None
    pixels = source.read(np.flatnonzero(labels >= 0))
    return [int(image[0, 0, 0]) for image in pixels]  # type: ignore[call-overload]


def counts(source: Source) -> list[int]:
    return np.bincount(LABELS[rows_of(source)], minlength=3).tolist()


class TestHeldOut:
    @pytest.mark.parametrize("method", [SUPERVISED, DISTILL], ids=["supervised", "distill"])
    @pytest.mark.parametrize("fraction", [None, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize("only", [False, True])
    def test_no_row_of_the_test_images_is_among_the_labels(
        self, method: MethodConfig, fraction: float | None, only: bool
    ) -> None:
        labels = None if fraction is None else {"fraction": fraction, "only": only}
        found = rows_of(part(method, labels))
        assert len(HELD_OUT) == 18
        assert not set(found) & HELD_OUT
        if fraction in (None, 1.0):
            assert set(found) == set(LABELLED.tolist()) - HELD_OUT

    def test_they_are_those_that_the_probes_are_tested_on(self) -> None:
        source = part(SUPERVISED, {"fraction": 1.0})
        data = DataConfig(source="a/folder")
        whole = whole_source(source)
        sets = open_labelled(NO_TEST_SET, data, whole, size_px=2, num_threads=1)
        assert sets is not None
        assert set(sets.test.rows.tolist()) == HELD_OUT
        assert sets.train.rows.tolist() == rows_of(source)

    def test_with_a_test_set_no_row_is(self) -> None:
        assert rows_of(part(SUPERVISED, evaluate=TEST_SET)) == LABELLED.tolist()
        source = toy(np.arange(100) % 3)
        assert part(SUPERVISED, evaluate=TEST_SET, source=source) is source
        assert part(DISTILL, evaluate=TEST_SET, source=source) is source


class TestSplits:
    """A split that lies beside the training images tests; then no label need be held out."""

    def found(self, root: Path, split: str | None = None) -> tuple[Source, EvalImages]:
        data = DataConfig(source=str(root), split=split)
        source = open_training_source(data, NO_TEST_SET, SUPERVISED)
        sets = open_labelled(NO_TEST_SET, data, whole_source(source), size_px=2, num_threads=1)
        assert sets is not None
        return source, sets.test

    @pytest.mark.parametrize(
        ("classes", "split", "num_labels"),
        [
            ({"train": "ab", "val": "ab"}, None, 20),
            ({"train": "ab", "val": "b"}, None, 20),
            ({"train": "ab", "val": "ac"}, None, 16),  # not the same classes: a fifth is held out
            ({"train": "ab", "val": "ab"}, "val", 16),  # trained on: none is left to test on
            ({"train": "ab", "val": "ab", "test": "ab"}, "val", 20),
        ],
    )
    def test_no_image_is_trained_on_and_tested_on(
        self, tmp_path: Path, classes: dict[str, str], split: str | None, num_labels: int
    ) -> None:
        for name, letters in classes.items():
            for letter in letters:
                (tmp_path / name / letter).mkdir(parents=True)
                for number in range(10):
                    pixels = np.full((4, 4, 3), number, np.uint8)
                    cv2.imwrite(str(tmp_path / name / letter / f"{number}.png"), pixels)
        source, test = self.found(tmp_path, split)
        labels = source.labels()
        assert labels is not None
        trained = {source.where(row) for row in np.flatnonzero(labels >= 0).tolist()}
        tested = {test.source.where(row) for row in test.rows.tolist()}
        assert len(trained) == num_labels
        assert tested
        assert not trained & tested


class TestSubset:
    @pytest.mark.parametrize("method", [SUPERVISED, DISTILL], ids=["supervised", "distill"])
    @pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
    def test_is_balanced(self, method: MethodConfig, fraction: float) -> None:
        found = counts(part(method, {"fraction": fraction}))
        assert sum(found) == max(3, round(72 * fraction))
        assert max(found) - min(found) <= 1

    def test_a_smaller_share_lies_within_a_larger_one(self) -> None:
        parts = [set(rows_of(part(SUPERVISED, {"fraction": f}))) for f in (0.05, 0.2, 0.6, 1.0)]
        assert parts[0] < parts[1] < parts[2] < parts[3]

    def test_is_a_function_of_the_seed_and_of_no_method(self) -> None:
        def rows(method: MethodConfig, seed: int, *, only: bool = False) -> list[int]:
            return rows_of(part(method, {"fraction": 0.2, "seed": seed, "only": only}))

        assert rows(SUPERVISED, 1) == rows(DISTILL, 1) == rows(DISTILL, 1, only=True)
        assert rows(SUPERVISED, 1) != rows(SUPERVISED, 2)

    def test_images_without_a_label_stay_unless_they_are_of_no_use(self) -> None:
        def num_images(method: MethodConfig, *, only: bool) -> int:
            found = part(method, {"fraction": 0.5, "only": only})
            return int(found.group_sizes.sum())

        assert num_images(SUPERVISED, only=False) == 36
        assert num_images(DISTILL, only=False) == 100
        assert num_images(DISTILL, only=True) == 36
        assert num_images(SimCLRConfig(), only=True) == 36
        assert int(part(SUPERVISED).group_sizes.sum()) == 72

    def test_who_asks_for_no_labels_gets_the_source_as_it_is(self) -> None:
        for method in (SimCLRConfig(), NO_LABELS):
            source = toy()
            assert part(method, source=source) is source

    def test_opens_what_the_configuration_names(self) -> None:
        data = DataConfig.model_validate(
            {"source": "digits", "limit": 200, "labels": {"fraction": 0.1, "only": True}}
        )
        source = open_training_source(data, NO_TEST_SET, SUPERVISED)
        labels = source.labels()
        assert labels is not None
        assert np.bincount(labels).tolist() == [2] * 10
        assert int(source.group_sizes.sum()) == 20


class TestErrors:
    @pytest.mark.parametrize("labels", [None, np.full(100, -1)], ids=["none", "all unknown"])
    def test_no_labels(self, labels: Any) -> None:
        source = toy(labels)
        with pytest.raises(
            DataError, match=r"^method supervised needs labels; toy has none: use a "
        ):
            part(SUPERVISED, source=source)
        with pytest.raises(DataError, match=r"^data.labels needs labels; toy has none"):
            part(DISTILL, {"fraction": 0.5}, source=source)
        assert part(DISTILL, source=source) is source

    def test_what_the_source_says_of_its_labels_is_told(self) -> None:
        source = toy(None)
        source.notes = ("3 files left out", "column 'label' holds measurements (0.5), not classes")
        with pytest.raises(DataError) as caught:
            part(SUPERVISED, source=source)
        assert "holds measurements (0.5), not classes" in str(caught.value)
        assert "left out" not in str(caught.value)

    def test_labels_that_are_left_out_are_no_labels_to_learn_from(self) -> None:
        data = DataConfig(source="digits", labels="none")
        with pytest.raises(DataError, match=r"digits/train has none: data.labels=none"):
            open_training_source(data, NO_TEST_SET, SUPERVISED)
        assert open_training_source(data, NO_TEST_SET, SimCLRConfig()).labels() is None

    def test_a_single_label_that_is_held_out(self) -> None:
        labels = np.full(100, -1)
        labels[3] = 0
        with pytest.raises(DataError, match=r"toy has 1 labelled image, .* set evaluate.source"):
            part(SUPERVISED, source=toy(labels))
        assert rows_of(part(SUPERVISED, source=toy(labels), evaluate=TEST_SET)) == [3]


class TestRecord:
    def test_says_which_rows_were_chosen_and_of_what(self) -> None:
        labels = {"fraction": 0.25, "seed": 4}
        for method in (SUPERVISED, DISTILL):
            source = part(method, labels)
            assert isinstance(source, SubsetSource)
            record = labels_record(
                source, DataConfig.model_validate({"source": "a/folder", "labels": labels}).labels
            )
            assert record == {
                "source": "toy",
                "fingerprint": toy().fingerprint,
                "fraction": 0.25,
                "seed": 4,
                "rows": rows_of(source),
            }
            assert record is not None
            assert all(type(row) is int for row in record["rows"])

    def test_there_is_none_where_no_part_was_asked_for(self) -> None:
        assert labels_record(part(SUPERVISED), None) is None
        assert labels_record(part(SimCLRConfig()), None) is None
