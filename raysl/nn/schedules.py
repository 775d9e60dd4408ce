"""Schedules as pure functions of the step, which need no saved state."""

import math


def cosine(step: int, total_steps: int, *, start: float, end: float) -> float:
    """Return the value of half a cosine from ``start`` at step 0 to ``end`` at ``total_steps``."""
    share = min(max(step / max(1, total_steps), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def warmup_cosine(
    step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int
) -> float:
    """Return the value of a linear warm-up to ``peak``, followed by half a cosine to ``final``.

    Args:
        step: Optimizer step, counted from 0; the value is for the step about to be taken.
        peak: Value at the end of the warm-up.
        final: Value approached at the end of the run.
        warmup_steps: Number of warm-up steps; step 0 has peak / warmup_steps.
        total_steps: Number of steps of the whole run.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983v5, eq. (5), without restarts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return cosine(step - warmup_steps, total_steps - warmup_steps, start=peak, end=final)
