import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from raysl.config.load import parse_override, validate
from raysl.config.yaml_text import parse_yaml, to_yaml
from raysl.sources.labels import Rows, balanced_subset, hold_out
from raysl.sources.mixed import MixedSource
from raysl.sources.open import open_source
from raysl.sources.source import ArraySource, DataConfig, Source, SourceConfig, WeightedSource
from raysl.sources.subset import SubsetSource, UnlabelledSource, whole_source

LABELS = [1, 0, -1, 2, 1, 0, 2, -1, 0, 1]
KNOWN: Rows = np.array([1, 3, 4, 9])


def toy(name: str, levels: range, labels: list[int] | None) -> ArraySource:
    """Images that are their row's number all over."""
    images = np.stack([np.full((2, 2, 3), level, dtype=np.uint8) for level in levels])
    numbers = None if labels is None else np.array(labels)
    return ArraySource(name, images, numbers, ["cat", "dog", "cow"])


def grouped(weights: tuple[float, ...] = (1.0, 0.5, 2.0)) -> MixedSource:
    """The ten rows in groups of 3, 3 and 4; row i is i all over."""
    bounds = ((0, 3), (3, 6), (6, 10))
    parts = [toy(f"part {a}", range(a, b), LABELS[a:b]) for a, b in bounds]
    return MixedSource(parts, weights)


def levels(source: Source, rows: Any) -> list[int]:
    return [int(image[0, 0, 0]) for image in source.read(rows)]  # type: ignore[call-overload]


def seen(source: Source) -> list[int]:
    labels = source.labels()
    assert labels is not None
    return labels.tolist()


class TestOnlyTheKnown:
    def subset(self, known: npt.NDArray[np.int64] = KNOWN) -> SubsetSource:
        return SubsetSource(grouped(), known, only=True)

    def test_rows_are_those_that_are_known_in_order(self) -> None:
        source = self.subset()
        assert levels(source, range(4)) == [1, 3, 4, 9]
        assert levels(source, np.array([3, 0, 3])) == [9, 1, 9]

    def test_labels_and_names_belong_to_the_rows(self) -> None:
        source, whole = self.subset(), grouped()
        assert seen(source) == [LABELS[row] for row in KNOWN]
        assert [source.where(row) for row in range(4)] == [whole.where(row) for row in KNOWN]
        assert source.where(3) == "part 6 image 3"
        assert (source.class_names, source.name) == (whole.class_names, whole.name)

    def test_group_sizes_sum_up_to_the_rows_group_by_group(self) -> None:
        assert self.subset().group_sizes.tolist() == [1, 2, 1]
        assert self.subset(np.arange(10)).group_sizes.tolist() == [3, 3, 4]

    def test_a_group_of_which_nothing_is_kept_goes_with_its_weight(self) -> None:
        source = self.subset(np.array([0, 2, 6]))
        assert source.group_sizes.tolist() == [2, 1]
        assert source.weights is not None
        assert source.weights.tolist() == [1.0, 2.0]

    @pytest.mark.parametrize("count", range(11))
    def test_any_rows_fill_their_groups(self, count: int) -> None:
        rng = np.random.default_rng(count)
        known = np.sort(rng.permutation(10)[:count])
        source = self.subset(known)
        assert source.group_sizes.sum() == count
        assert (source.group_sizes > 0).all()
        assert levels(source, range(count)) == known.tolist()

    def test_a_window_shrinks_with_what_is_kept_of_a_group(self) -> None:
        whole = grouped()
        assert SubsetSource(whole, KNOWN, only=True).window_size is None
        whole.window_size = 5
        assert SubsetSource(whole, KNOWN, only=True).window_size == 2
        assert SubsetSource(whole, KNOWN[:1], only=True).window_size == 1
        assert SubsetSource(whole, KNOWN, only=False).window_size == 5


class TestAllImages:
    def subset(self) -> SubsetSource:
        return SubsetSource(grouped(), KNOWN, only=False)

    def test_stay_where_they_were(self) -> None:
        source, whole = self.subset(), grouped()
        assert levels(source, [7, 0, 9]) == [7, 0, 9]
        assert [source.where(row) for row in range(10)] == [whole.where(row) for row in range(10)]
        assert source.group_sizes.tolist() == whole.group_sizes.tolist() == [3, 3, 4]
        assert source.weights is not None
        assert source.weights.tolist() == [1.0, 0.5, 2.0]

    def test_have_no_label_but_for_the_known(self) -> None:
        assert seen(self.subset()) == [-1, 0, -1, 2, 1, -1, -1, -1, -1, 1]

    def test_the_labels_of_the_whole_stay(self) -> None:
        source = self.subset()
        seen(source)[0] = 5
        assert seen(whole_source(source)) == LABELS


class TestSubsetSource:
    def test_fingerprint_changes_with_images_rows_and_what_is_left_out(self) -> None:
        made = [
            SubsetSource(grouped(), KNOWN, only=True),
            SubsetSource(grouped(), KNOWN, only=False),
            SubsetSource(grouped(), KNOWN[:3], only=True),
            SubsetSource(grouped((1.0, 1.0, 2.0)), KNOWN, only=True),
        ]
        assert len({source.fingerprint for source in made} | {grouped().fingerprint}) == 5
        again = SubsetSource(grouped(), KNOWN.astype(np.int32).astype(np.int64), only=True)
        assert again.fingerprint == made[0].fingerprint

    @pytest.mark.parametrize("only", [False, True])
    def test_survives_pickling(self, only: bool) -> None:
        source = SubsetSource(grouped(), KNOWN, only=only)
        copy = pickle.loads(pickle.dumps(source))
        assert levels(copy, [2, 1]) == levels(source, [2, 1])
        assert seen(copy) == seen(source)
        assert copy.fingerprint == source.fingerprint

    def test_the_whole_source_of_any_other_is_itself(self) -> None:
        whole = grouped()
        assert whole_source(whole) is whole
        assert whole_source(SubsetSource(whole, KNOWN, only=True)) is whole


class TestUnlabelledSource:
    def test_has_the_images_and_no_labels(self) -> None:
        whole = grouped()
        whole.notes, whole.splits = ("1 file left out",), ("train", "test")
        source = UnlabelledSource(whole)
        assert source.labels() is None
        assert source.class_names == []
        assert levels(source, [7, 0, 9]) == [7, 0, 9]
        rows = range(10)
        assert [source.where(r) for r in rows] == [whole.where(r) for r in rows]
        assert [source.row_id(r) for r in rows] == [whole.row_id(r) for r in rows]
        assert [source.decoding(r) for r in rows] == [whole.decoding(r) for r in rows]
        assert source.group_sizes.tolist() == [3, 3, 4]
        assert source.weights is whole.weights
        kept = ("name", "fingerprint", "notes", "splits", "window_size")
        assert [getattr(source, n) for n in kept] == [getattr(whole, n) for n in kept]

    def test_never_reads_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = grouped()
        monkeypatch.setattr(whole, "labels", lambda: pytest.fail("read"))
        assert pickle.loads(pickle.dumps(UnlabelledSource(grouped()))).labels() is None
        assert UnlabelledSource(whole).labels() is None

    def test_evaluation_sees_no_more_of_it(self) -> None:
        source = UnlabelledSource(grouped())
        assert whole_source(source) is source

    @pytest.mark.parametrize("mix", [(), (WeightedSource(source="digits"),)])
    def test_is_what_labels_none_opens_of_the_training_images_alone(self, mix: Any) -> None:
        data = DataConfig(source="digits", limit=20, mix=mix, labels="none")
        assert open_source(data, data=data).labels() is None
        assert open_source(SourceConfig(source="digits"), data=data).labels() is not None

    def test_labels_none_is_text_in_yaml_and_on_the_command_line(self) -> None:
        assert parse_override("data.labels=none") == ("data.labels", "none")
        data = validate(DataConfig, {"source": "digits", "labels": "none"}, where="data")
        again = parse_yaml(to_yaml(data.model_dump(mode="json")), where="data")
        assert validate(DataConfig, again, where="data") == data


class TestHoldOut:
    def test_is_a_fifth_that_is_always_the_same_and_nothing_is_lost(self) -> None:
        rows = np.arange(0, 200, 2)
        train, test = hold_out(rows)
        assert (len(train), len(test)) == (80, 20)
        assert sorted([*train.tolist(), *test.tolist()]) == rows.tolist()
        assert np.array_equal(hold_out(rows)[1], test)

    def test_a_subset_of_what_is_left_has_no_row_of_the_fifth(self) -> None:
        labels = np.arange(100) % 3
        train, test = hold_out(np.arange(100))
        for fraction in (0.1, 0.5, 1.0):
            chosen = train[balanced_subset(labels[train], fraction=fraction, seed=1)]
            assert not set(chosen.tolist()) & set(test.tolist())
