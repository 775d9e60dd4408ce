import math

import pytest

from raysl.train.keep import KeepBest, KeepRule, newest

STEPS = [2, 4, 6, 8, 10]
VALUES = {2: 0.5, 4: 0.9, 6: math.nan, 8: 0.1, 12: 1.0}


def kept(rule: KeepRule, *, pending: tuple[int, ...] = ()) -> list[int]:
    return sorted(rule.kept(STEPS, values=VALUES, pending=pending))


def test_the_newest_are_kept() -> None:
    assert kept(KeepRule(2)) == list(newest(2)(STEPS)) == [8, 10]
    assert kept(KeepRule(9)) == STEPS


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (KeepBest(), [4, 10]),
        (KeepBest(count=2), [2, 4, 10]),
        (KeepBest(mode="min"), [8, 10]),
        (KeepBest(count=9), [2, 4, 8, 10]),  # neither one that is not finite nor one unmeasured
    ],
)
def test_the_best_that_were_measured_are_kept_besides(best: KeepBest, expected: list[int]) -> None:
    assert kept(KeepRule(1, best)) == expected


def test_what_is_being_measured_is_kept_until_then() -> None:
    assert kept(KeepRule(1, KeepBest()), pending=(6, 7)) == [4, 6, 10]
    assert kept(KeepRule(1), pending=(6, 7)) == [10]


def test_of_equals_the_earlier_stays() -> None:
    """Else each new checkpoint of a flat curve would take the place of the one before."""
    rule = KeepRule(1, KeepBest())
    assert rule.kept([1, 2, 3], values={1: 0.5, 2: 0.5}, pending=()) == {1, 3}


@pytest.mark.parametrize(
    ("every", "saved_every", "expected"),
    [
        (4, 2, [4, 8, 10]),
        (3, 2, [4, 6, 10]),  # of 3 and of 6; of 9 it is the 10th, which is the newest as well
        (100, 2, [10]),
        (1, 2, STEPS),
    ],
)
def test_the_first_after_each_multiple_is_kept(
    every: int, saved_every: int, expected: list[int]
) -> None:
    assert kept(KeepRule(1, every=every, saved_every=saved_every)) == expected
