"""Schedules as pure functions of the step, so that nothing has to be saved for them."""

import math


def cosine(step: int, total_steps: int, *, start: float, end: float) -> float:
    """Go from ``start`` at step 0 to ``end`` at ``total_steps`` along half a cosine."""
    share = min(max(step / max(1, total_steps), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def warmup_cosine(
    step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int
) -> float:
    """Rise linearly to ``peak`` over the warm-up, then fall to ``final`` along half a cosine.

    Args:
        step: Optimizer step, counted from 0; the value is that of the step about to be taken.
        peak: Value at the end of the warm-up.
        final: Value that the end of the run approaches.
        warmup_steps: Steps of the rise; step 0 takes peak / warmup_steps.
        total_steps: Steps of the whole run.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983v5, eq. (5), without restarts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return cosine(step - warmup_steps, total_steps - warmup_steps, start=peak, end=final)
