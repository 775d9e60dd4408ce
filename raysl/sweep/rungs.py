"""Compute when a scheduler judges a trial: at the evaluation nearest to a rung.

Trials of different batch sizes are evaluated at different fractions of an epoch, because
evaluations are at whole steps. A rung is therefore an epoch; a trial reaches it at its nearest
evaluation.
"""

import math
from fractions import Fraction
from typing import NamedTuple

# `to_fraction` recovers step / steps_per_epoch if steps_per_epoch is at most this.
_MOST_STEPS_PER_EPOCH = 10**6


def to_fraction(value: float) -> Fraction:
    """Return the simple fraction nearest to a float: 1/10 for 0.1."""
    return Fraction(value).limit_denominator(_MOST_STEPS_PER_EPOCH)


def round_half_up(value: Fraction) -> int:
    """Return the nearest whole number, rounding halves up."""
    return math.floor(value + Fraction(1, 2))


class Evaluations:
    """Convert a trial's epochs to evaluation numbers; all but the last are evenly spaced.

    Args:
        spacing: Epochs between evaluations.
    """

    def __init__(self, spacing: float) -> None:
        self._spacing = to_fraction(spacing)

    def number_at(self, epoch: float) -> int:
        """Return the evaluation number at an epoch; round up for an irregular last one."""
        return math.ceil(to_fraction(epoch) / self._spacing)

    def nearest_to(self, epoch: Fraction) -> int:
        """Return the nearest evaluation's number, at least 1, rounding halves up."""
        return max(1, round_half_up(epoch / self._spacing))

    def num_periods_ended(self, epoch: float, period: float) -> int:
        """Count the multiples of a period whose nearest evaluation is not after an epoch."""
        # Epochs from here on are nearest to the next evaluation.
        end = (self.number_at(epoch) + Fraction(1, 2)) * self._spacing
        return math.ceil(end / to_fraction(period)) - 1


class BracketPlan(NamedTuple):
    """One bracket of HyperBand."""

    size: int
    """Number of trials that start in it."""
    evaluations: tuple[int, ...]
    """Numbers of the evaluations that compare trials, excluding max_evaluations unless a number is
    rounded to it."""


def hyperband(max_evaluations: int, reduction_factor: float) -> list[BracketPlan]:
    """Return one round of brackets, from most to fewest rungs.

    Source: Li et al. 2016, arXiv:1603.06560v4, Algorithm 1.

    Args:
        max_evaluations: R, number of evaluations of a trial that is never stopped.
        reduction_factor: eta; one of this many trials continues at each rung.
    """
    factor = to_fraction(reduction_factor)
    max_rungs = 0
    while factor ** (max_rungs + 1) <= max_evaluations:
        max_rungs += 1
    plans = []
    for num_rungs in range(max_rungs, -1, -1):
        size = math.ceil(Fraction(max_rungs + 1, num_rungs + 1) * factor**num_rungs)
        evaluations = (
            round_half_up(max_evaluations / factor ** (num_rungs - i)) for i in range(num_rungs)
        )
        distinct = tuple(dict.fromkeys(evaluations))  # rounding can repeat a number
        plans.append(BracketPlan(size, distinct))
    return plans
