from typing import Any

import pytest

from raysl.sweep.config import Dimension
from raysl.sweep.parameter import Parameter, parameters


@pytest.fixture
def axis(make_trial: Any) -> Any:
    """Make the axis of one parameter from the values of trials."""

    def make(values: list[Any], dimension: Dimension | None = None) -> Parameter:
        trials = [make_trial(n, {"a.x": value}, [0.5]) for n, value in enumerate(values)]
        (found,) = parameters(trials, {} if dimension is None else {"a.x": dimension})
        return found

    return make


class TestListed:
    def test_numbers_stand_by_size_and_labels_as_the_space_has_them(self, axis: Any) -> None:
        numbers = axis([512, 64, 128, 64], Dimension(grid=(512, 64, 128)))
        assert numbers.texts() == ["64", "128", "512"]
        assert not numbers.is_label
        labels = axis(["b", "c", "a"], Dimension(choice={"c": 1, "a": 2, "b": 3, "unseen": 4}))
        assert labels.texts() == ["c", "a", "b"]
        assert labels.is_label

    def test_many_listed_numbers_keep_a_place_each(self, axis: Any) -> None:
        values = tuple(range(12))
        assert axis(list(values), Dimension(grid=values)).num_slots == 12

    def test_a_setting_that_is_off_comes_before_its_numbers(self, axis: Any) -> None:
        assert axis([1.0, None, 0.5]).texts() == ["none", "0.5", "1"]

    def test_labels_that_no_space_lists_keep_their_order(self, axis: Any) -> None:
        assert axis(["simclr", "byol", "simclr"]).values == ("simclr", "byol")

    def test_a_short_range_of_whole_numbers_is_listed(self, axis: Any) -> None:
        assert axis([3, 1, 2], Dimension(int=(1, 9))).values == (1, 2, 3)


class TestBinned:
    def test_bins_are_even_on_the_scale_of_the_range(self, axis: Any) -> None:
        even = axis([0.0, 0.3, 0.1], Dimension(uniform=(0, 1)))
        assert even.edges == pytest.approx((0.0, 0.1, 0.2, 0.3))
        log = axis([0.001, 1.0, 0.5], Dimension(log_uniform=(1e-4, 1)))
        assert log.edges == pytest.approx((0.001, 0.01, 0.1, 1.0))
        assert (even.is_log, log.is_log) == (False, True)

    def test_every_value_has_a_place_and_larger_ones_no_lower_one(self, axis: Any) -> None:
        values = sorted(0.9 ** (7 * n % 48) for n in range(48))
        found = axis(values, Dimension(log_uniform=(1e-4, 1)))
        places = [found.slot(value) for value in values]
        assert places == sorted(places)
        assert set(places) == set(range(found.num_slots))

    def test_more_trials_get_more_bins_up_to_six(self, axis: Any) -> None:
        space = Dimension(uniform=(0, 1))
        nums = [axis([n / 400 for n in range(count)], space).num_slots for count in (6, 48, 400)]
        assert nums == [3, 4, 6]

    def test_a_long_range_of_whole_numbers_is_binned(self, axis: Any) -> None:
        found = axis(list(range(100, 10_000, 500)), Dimension(log_int=(100, 10_000)))
        assert found.is_log
        assert found.texts() == ["100 to 460", "460 to 2,100", "2,100 to 9,600"]
        assert found.tick_texts() == ["100", "460", "2,100", "9,600"]

    def test_numbers_that_training_moved_off_their_list_are_binned(self, axis: Any) -> None:
        moved = [0.1 * 1.2**n for n in range(20)]
        assert axis(moved, Dimension(choice=(0.1, 0.2))).is_log


class TestParameters:
    def test_leaves_out_the_seed_and_what_does_not_differ(self, make_trial: Any) -> None:
        trials = [
            make_trial(n, {"b": n, "same": 1, "seed": n, **({"only": 1} if n else {})}, [])
            for n in range(3)
        ]
        assert [parameter.key for parameter in parameters(trials, {})] == ["b"]

    def test_a_name_that_a_picture_cannot_draw_gets_a_number(self, axis: Any) -> None:
        assert axis(["\u732b", "x" * 50]).drawable_texts() == ["value 1", "x" * 17 + "..."]
