"""Which labels training sees: balanced, nested, and never those of held-out test images."""

import pickle

import numpy as np
import numpy.typing as npt
import pytest

from raysl.errors import DataError
from raysl.evaluate.protocol import EvaluateConfig, open_labelled
from raysl.evaluate.training_source import labels_record, seen_part
from raysl.methods import load_method
from raysl.methods.base import MethodConfig
from raysl.sources.labels import balanced_subset, hold_out
from raysl.sources.source import ArraySource, DataConfig, LabelsConfig
from raysl.sources.subset import SubsetSource, whole_source

SUPERVISED = load_method("supervised").Config()
SIMCLR = load_method("simclr").Config()


def num_of_each(labels: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> list[int]:
    return np.bincount(labels[places]).tolist()


class TestBalancedSubset:
    LABELS = np.repeat([0, 1, 2], [500, 300, 100])

    @pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3])
    def test_takes_as_many_of_each_class_though_some_are_larger(self, fraction: float) -> None:
        places = balanced_subset(self.LABELS, fraction=fraction, seed=0)
        assert num_of_each(self.LABELS, places) == [round(fraction * 900) // 3] * 3

    def test_what_does_not_divide_goes_to_some_classes(self) -> None:
        counts = num_of_each(self.LABELS, balanced_subset(self.LABELS, fraction=20 / 900, seed=0))
        assert sorted(counts) == [6, 7, 7]

    def test_a_class_that_is_too_small_is_taken_whole_and_the_others_fill_up(self) -> None:
        places = balanced_subset(self.LABELS, fraction=0.5, seed=0)
        assert num_of_each(self.LABELS, places) == [175, 175, 100]
        places = balanced_subset(self.LABELS, fraction=0.9, seed=0)
        assert num_of_each(self.LABELS, places) == [410, 300, 100]

    def test_all_of_them_are_all(self) -> None:
        places = balanced_subset(self.LABELS, fraction=1.0, seed=0)
        assert places.tolist() == list(range(900))

    def test_one_percent_of_few_images_still_has_every_class(self) -> None:
        labels = np.arange(100) % 10
        assert num_of_each(labels, balanced_subset(labels, fraction=0.01, seed=0)) == [1] * 10

    def test_is_a_function_of_the_seed_in_order_and_without_repetition(self) -> None:
        first = balanced_subset(self.LABELS, fraction=0.1, seed=3)
        assert np.array_equal(first, balanced_subset(self.LABELS, fraction=0.1, seed=3))
        assert not np.array_equal(first, balanced_subset(self.LABELS, fraction=0.1, seed=4))
        assert (np.diff(first) > 0).all()

    def test_a_smaller_part_lies_within_a_larger_one(self) -> None:
        parts = [set(balanced_subset(self.LABELS, fraction=f, seed=0)) for f in (0.01, 0.1, 0.5)]
        assert parts[0] < parts[1] < parts[2]

    def test_class_numbers_may_have_gaps(self) -> None:
        labels = np.array([7, 7, 7, 2, 2, 2])
        assert sorted(labels[balanced_subset(labels, fraction=0.4, seed=0)]) == [2, 7]


class InGroups(ArraySource):
    """Images in groups of ten, as row groups are; pixel and label say which row it is."""

    def __init__(self, n: int, *, unlabelled: int = 0) -> None:
        labels = np.arange(n) % 5
        labels[:unlabelled] = -1
        pixels = np.arange(n, dtype=np.uint8).reshape(n, 1, 1)
        super().__init__("in groups", pixels, labels, list("abcde"))
        self.window_size = 20  # type: ignore[assignment]

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        return np.full(len(self.images) // 10, 10, dtype=np.int64)


class TestSubsetSource:
    KNOWN = np.array([3, 14, 15, 41, 49])

    def test_only_leaves_the_others_out_and_counts_groups_anew(self) -> None:
        whole = InGroups(50)
        source = SubsetSource(whole, self.KNOWN, only=True)
        assert source.group_sizes.tolist() == [1, 2, 2]  # groups 0, 1, 4
        assert [int(image[0, 0]) for image in source.read([4, 0, 2])] == [49, 3, 15]  # type: ignore[arg-type, index]
        assert source.labels().tolist() == (self.KNOWN % 5).tolist()  # type: ignore[union-attr]
        assert source.where(1) == whole.where(14)
        assert source.class_names == list("abcde")
        assert source.window_size == 2  # as much reading as for 20 images of the whole

    def test_otherwise_the_others_stay_without_a_label(self) -> None:
        whole = InGroups(50)
        source = SubsetSource(whole, self.KNOWN, only=False)
        labels = source.labels()
        assert labels is not None
        assert np.flatnonzero(labels >= 0).tolist() == self.KNOWN.tolist()
        assert source.group_sizes.tolist() == whole.group_sizes.tolist()
        assert source.where(7) == whole.where(7)
        assert np.array_equal(source.read([7])[0], whole.read([7])[0])

    def test_weights_of_groups_stay_with_them(self) -> None:
        whole = InGroups(50)
        whole.weights = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
        source = SubsetSource(whole, self.KNOWN, only=True)
        assert source.weights is not None
        assert source.weights.tolist() == [1.0, 2.0, 5.0]

    def test_its_fingerprint_says_which_labels_are_seen(self) -> None:
        whole = InGroups(50)
        found = {
            SubsetSource(whole, known, only=only).fingerprint
            for known in (self.KNOWN, self.KNOWN[1:])
            for only in (True, False)
        }
        assert len(found | {whole.fingerprint}) == 5

    def test_travels_to_other_processes(self) -> None:
        source = pickle.loads(pickle.dumps(SubsetSource(InGroups(50), self.KNOWN, only=True)))
        assert int(source.read([1])[0][0, 0]) == 14

    def test_evaluation_sees_the_whole(self) -> None:
        whole = InGroups(50)
        assert whole_source(SubsetSource(whole, self.KNOWN, only=True)) is whole
        assert whole_source(whole) is whole


class TestSeenPart:
    """Of a source without a test set, a fifth of whose labels is held out."""

    DATA = DataConfig(source="somewhere")

    def seen(self, method: MethodConfig, labels: LabelsConfig | None, n: int = 100) -> SubsetSource:
        data = self.DATA.model_copy(update={"labels": labels})
        found = seen_part(InGroups(n), data, EvaluateConfig(), method)
        assert isinstance(found, SubsetSource)
        return found

    @pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("only", [True, False])
    def test_never_has_a_label_that_tests(self, fraction: float, only: bool) -> None:
        found = self.seen(SIMCLR, LabelsConfig(fraction=fraction, only=only))
        sets = open_labelled(
            EvaluateConfig(few_shot_labels=2), self.DATA, found.whole, size_px=8, num_threads=1
        )
        assert sets is not None
        assert len(found.known) == round(80 * fraction)
        assert not set(found.known.tolist()) & set(sets.test.rows.tolist())

    def test_supervised_training_does_not_see_them_without_being_told_either(self) -> None:
        found = self.seen(SUPERVISED, None)
        assert found.only
        assert found.known.tolist() == hold_out(np.arange(100))[0].tolist()

    def test_a_method_without_labels_sees_the_source_itself(self) -> None:
        whole = InGroups(100)
        assert seen_part(whole, self.DATA, EvaluateConfig(), SIMCLR) is whole

    def test_with_a_test_set_all_labels_are_seen(self) -> None:
        whole = InGroups(100)
        apart = EvaluateConfig(source="elsewhere")
        assert seen_part(whole, self.DATA, apart, SUPERVISED) is whole

    def test_supervised_training_leaves_unlabelled_images_out(self) -> None:
        whole = InGroups(100, unlabelled=40)
        found = seen_part(whole, self.DATA, EvaluateConfig(source="elsewhere"), SUPERVISED)
        assert int(found.group_sizes.sum()) == 60
        assert (found.labels() >= 0).all()  # type: ignore[operator]

    def test_a_smaller_share_lies_within_a_larger_one_of_the_same_seed(self) -> None:
        small, large, other = (
            set(self.seen(SUPERVISED, LabelsConfig(fraction=f, seed=s)).known.tolist())
            for f, s in ((0.1, 3), (0.5, 3), (0.1, 4))
        )
        assert small < large
        assert small != other

    @pytest.mark.parametrize("labels", [None, LabelsConfig()])
    def test_no_labels_are_an_error_that_says_what_to_do(self, labels: LabelsConfig | None) -> None:
        data = self.DATA.model_copy(update={"labels": labels})
        source = ArraySource("plain", np.zeros((4, 1, 1), np.uint8))
        with pytest.raises(DataError, match=r"needs labels; plain has none.*data\.label_column"):
            seen_part(source, data, EvaluateConfig(), SUPERVISED)

    def test_what_was_seen_can_be_written_down(self) -> None:
        config = LabelsConfig(fraction=0.1, seed=2, only=True)
        found = self.seen(SUPERVISED, config)
        record = labels_record(found, config)
        assert record is not None
        assert record["rows"] == found.known.tolist()
        assert (record["source"], record["fraction"], record["seed"]) == ("in groups", 0.1, 2)
        assert record["fingerprint"] == found.whole.fingerprint
        assert labels_record(found.whole, config) is None
