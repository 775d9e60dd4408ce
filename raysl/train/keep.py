"""Which checkpoints to keep: the newest, the best by a metric, and some at regular intervals."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from raysl.config.base import Config, PositiveInt

Keep = Callable[[Sequence[int]], Collection[int]]
"""Given the steps of all checkpoints, in order, returns those to keep."""


class KeepBest(Config):
    """Which checkpoints are the best of a run."""

    metric: Literal[
        "eval/knn_top1",
        "eval/top1",
        "eval/rankme",
        "eval/alpha_req",
        "eval/alignment",
        "eval/uniformity",
        "train/loss",
    ] = "eval/knn_top1"
    """Key of ``metrics.jsonl``, measured at the step of the checkpoint."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller value of the metric is better."""
    count: PositiveInt = 1
    """Number of best checkpoints to keep."""


class KeepRule(NamedTuple):
    """Which checkpoints to keep.

    Attributes:
        newest: Number of newest checkpoints.
        best: Those to keep by a metric, if any.
        every: Optimizer steps; the first checkpoint at or after each multiple of them is kept.
        saved_every: Optimizer steps between two checkpoints.
    """

    newest: int
    best: KeepBest | None = None
    every: int | None = None
    saved_every: int = 1

    def kept(
        self, steps: Sequence[int], *, values: Mapping[int, float], pending: Collection[int]
    ) -> set[int]:
        """Return the steps of the checkpoints to keep.

        Args:
            steps: Steps of all checkpoints, in order.
            values: The metric of ``best`` by step; a checkpoint without one is not among the best.
            pending: Steps that are being measured, whose checkpoints are kept until then.
        """
        kept = set(steps[-self.newest :])
        if self.every is not None:
            kept |= {s for s in steps if s >= self.every and s % self.every < self.saved_every}
        if self.best is not None:
            sign = 1 if self.best.mode == "max" else -1
            measured = [step for step in steps if math.isfinite(values.get(step, math.nan))]
            ranked = sorted(measured, key=lambda step: sign * values[step], reverse=True)
            kept |= {*ranked[: self.best.count], *(step for step in steps if step in pending)}
        return kept


def newest(count: int) -> Keep:
    """Return the rule that keeps only the newest checkpoints."""
    return lambda steps: steps[-count:]
