"""Compute when a scheduler judges a trial: at the evaluation nearest to a rung.

Trials of different batch sizes are evaluated at different fractions of an epoch, because
evaluations are at whole steps. So a rung is an epoch, and each trial reaches it at the evaluation
nearest to it.
"""

import math
from fractions import Fraction
from typing import NamedTuple

# Epochs of evaluations are steps over steps per epoch: exact below this denominator.
_MOST_STEPS_PER_EPOCH = 10**6


def exact(value: float) -> Fraction:
    """Return the simple fraction that a float represents: 0.1 is 1/10."""
    return Fraction(value).limit_denominator(_MOST_STEPS_PER_EPOCH)


def nearest(value: Fraction) -> int:
    """Return the nearest whole number, rounding halves up."""
    return math.floor(value + Fraction(1, 2))


class Evaluations:
    """Number the evaluations of one trial: 1, 2, ...; evenly spaced, except perhaps the last.

    Args:
        first_epoch: Epoch of the first evaluation.
    """

    def __init__(self, first_epoch: float) -> None:
        self._spacing = exact(first_epoch)

    def number(self, epoch: float) -> int:
        """Return the number of the evaluation at an epoch; an irregular last one is the next."""
        return math.ceil(exact(epoch) / self._spacing)

    def nearest_to(self, epoch: Fraction) -> int:
        """Return the number of the evaluation nearest to an epoch, >= 1, rounding halves up."""
        return max(1, nearest(epoch / self._spacing))

    def periods(self, epoch: float, period: float) -> int:
        """Return how many multiples of a period have their nearest evaluation by an epoch."""
        # Halfway to the next evaluation: later epochs are nearest to that one.
        end = (self.number(epoch) + Fraction(1, 2)) * self._spacing
        return math.ceil(end / exact(period)) - 1


class BracketPlan(NamedTuple):
    """One successive halving of HyperBand."""

    size: int
    """Number of trials that start in it."""
    rungs: tuple[int, ...]
    """Numbers of the evaluations at which trials are compared, without the last one."""


def hyperband(max_evaluations: int, reduction_factor: float) -> list[BracketPlan]:
    """Return the brackets of one round, the one with most rungs first.

    Source: Li et al. 2016, arXiv:1603.06560v4, Algorithm 1.

    Args:
        max_evaluations: R, number of evaluations of a trial that is never stopped.
        reduction_factor: eta; one of this many trials continues at each rung.
    """
    factor = exact(reduction_factor)
    most = 0
    while factor ** (most + 1) <= max_evaluations:
        most += 1
    plans = []
    for halvings in range(most, -1, -1):
        size = math.ceil(Fraction(most + 1, halvings + 1) * factor**halvings)
        rungs = (nearest(max_evaluations / factor ** (halvings - i)) for i in range(halvings))
        plans.append(BracketPlan(size, tuple(dict.fromkeys(r for r in rungs if r))))
    return plans
