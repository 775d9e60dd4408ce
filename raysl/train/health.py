"""Check without labels whether training still works, and stop runs that diverged or collapsed."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from raysl.config.base import Config, Idle, PositiveFloat, PositiveInt
from raysl.errors import CollapsedError, DivergedError


class HealthConfig(Config):
    """When to stop a run that has diverged, collapsed or hangs, or whose workers differ."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("patience",), {"min_feature_std": (0,)}),)
    min_feature_std: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.003
    """A run whose features vary less than this has collapsed; 0 never stops."""
    patience: Annotated[int, Field(gt=0)] = 5
    """Number of consecutive logging steps before the run is stopped."""
    max_step_s: PositiveFloat | None = 1200.0
    """Seconds after which a step, an evaluation in the train workers or a checkpoint hangs: the
    stacks of all workers are written to ``stacks`` of the run folder, and the workers start again
    from the last checkpoint, which counts as a failure (``cluster.max_failures``); without Ray the
    run ends. Ten times the longest one so far is allowed in any case. null never ends a run."""
    check_ranks: PositiveInt | None = 10
    """Number of logging steps between two checks that weights, teachers, queues, statistics and
    optimizer states are equal on all train workers, to the bit; the first logging step is checked
    too. null never checks, for workers on different devices."""


class HealthCheck:
    """Check the metrics of each logging step, which are the same on every rank.

    Args:
        config: When to stop.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._collapsed_for = 0

    def __call__(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Raise if the run has diverged or collapsed.

        Args:
            metrics: The metrics of a logging step.
            step: Number of optimizer steps done.

        Raises:
            DivergedError: If the loss or the gradient norm is not finite.
            CollapsedError: If the features of all images have been equal for too long.
        """
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(metrics[name]):
                raise DivergedError(
                    f"{name} is {metrics[name]} at step {step} (learning rate "
                    f"{metrics['train/lr']:.3g}). The last finite checkpoint is kept. Lower "
                    f"optim.base_lr, lengthen optim.warmup, set optim.max_grad_norm, or use "
                    f"train.precision=fp32"
                )
        low = metrics["train/feature_std"] < self.config.min_feature_std
        self._collapsed_for = self._collapsed_for + 1 if low else 0
        if self._collapsed_for >= self.config.patience:
            raise CollapsedError(
                f"the features have collapsed: train/feature_std is "
                f"{metrics['train/feature_std']:.2g} at step {step}, below "
                f"health.min_feature_std={self.config.min_feature_std} for {self.config.patience} "
                f"logging steps. Likely settings: method.temperature (too high), optim.base_lr "
                f"(too high), method.ema_momentum (too low), data.views (too weak or too strong); "
                f"health.min_feature_std=0 disables this check"
            )
