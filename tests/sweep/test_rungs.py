"""Rungs lie at epochs; each trial meets one at its nearest evaluation, counted in whole ones."""

from fractions import Fraction

import pytest

from raysl.sweep.rungs import Evaluations, hyperband, round_half_up, to_fraction


def test_a_float_stands_for_its_simple_fraction() -> None:
    assert to_fraction(0.1) == Fraction(1, 10)
    assert to_fraction(7 / 195) == Fraction(7, 195)
    assert to_fraction(0.1 * 3) == Fraction(3, 10)


@pytest.mark.parametrize(("value", "whole"), [("5/2", 3), ("7/3", 2), ("1/4", 0)])
def test_nearest_takes_the_later_of_two(value: str, whole: int) -> None:
    assert round_half_up(Fraction(value)) == whole


class TestEvaluations:
    def test_are_numbered_whatever_the_steps_per_epoch(self) -> None:
        for steps_per_epoch, every in ((5, 2), (10, 1), (195, 39), (781, 234)):
            clock = Evaluations(every / steps_per_epoch)
            found = [clock.number_at(n * every / steps_per_epoch) for n in range(1, 50)]
            assert found == list(range(1, 50))

    def test_the_last_one_may_come_early(self) -> None:
        clock = Evaluations(3 / 5)  # every 3 of 20 steps: 3, 6, ..., 18, 20
        assert [clock.number_at(step / 5) for step in (15, 18, 20)] == [5, 6, 7]

    def test_a_rung_is_met_at_the_nearest_one(self) -> None:
        clock = Evaluations(2 / 5)
        assert [clock.nearest_to(Fraction(r)) for r in ("1/2", "1", "2")] == [1, 3, 5]
        assert clock.nearest_to(Fraction(1, 100)) == 1  # there is none before the first

    @pytest.mark.parametrize(
        ("steps_per_epoch", "every", "period", "counts"),
        [
            (10, 1, 0.1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),  # in floats .3 - .2 < .1
            (10, 1, 0.3, [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),
            (5, 2, 0.5, [1, 1, 2, 3, 4]),  # .4 .8 1.2 1.6 2: the multiples .5 1 1.5 2
            (4, 2, 1.0, [0, 1, 1, 2]),
            (3, 1, 0.1, [4, 8, 11]),  # several multiples in one
        ],
    )
    def test_periods_are_over_at_the_nearest_one(
        self, steps_per_epoch: int, every: int, period: float, counts: list[int]
    ) -> None:
        clock = Evaluations(every / steps_per_epoch)
        found = [
            clock.num_periods_ended(n * every / steps_per_epoch, period)
            for n in range(1, len(counts) + 1)
        ]
        assert found == counts


class TestHyperband:
    def test_is_the_table_of_the_paper(self) -> None:
        """Table 1 of arXiv:1603.06560v4: R = 81, eta = 3."""
        plans = hyperband(81, 3.0)
        assert [plan.size for plan in plans] == [81, 34, 15, 8, 5]
        assert [plan.evaluations for plan in plans] == [
            (1, 3, 9, 27),
            (3, 9, 27),
            (9, 27),
            (27,),
            (),
        ]

    def test_two_evaluations_halve_once(self) -> None:
        assert [tuple(plan) for plan in hyperband(2, 2.0)] == [(2, (1,)), (2, ())]

    def test_a_factor_beyond_the_evaluations_compares_nobody(self) -> None:
        assert [tuple(plan) for plan in hyperband(3, 4.0)] == [(1, ())]
