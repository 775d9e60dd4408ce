"""Is the encoder learning anything? Numbers that need no labels, and the alarms on them."""

import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raysl.config.base import Config, NonNegativeFloat
from raysl.errors import CollapsedError, DivergedError


class HealthConfig(Config):
    """When a run is stopped because it cannot come to anything."""

    min_feature_std: NonNegativeFloat = 0.003
    """A run whose features vary less than this is collapsed; 0 never stops."""
    patience: Annotated[int, Field(gt=0)] = 5
    """Logging steps in a row before it is stopped."""


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Return the mean standard deviation of the normalised features, times sqrt(D).

    Args:
        features: ``(N, D)``, any float dtype.

    Returns:
        Scalar float32 in [0, 1]: 0 if all images have the same direction, about 1 if directions are
        spread evenly over the sphere.

    Source: Chen and He 2020, arXiv:2011.10566v1, sec. 4.1.
    """
    directions = F.normalize(features.float(), dim=1)
    return directions.std(dim=0, unbiased=False).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Return the exponential of the entropy of the normalised singular values.

    Args:
        features: ``(N, D)``, any float dtype.

    Returns:
        Scalar float32 in [1, min(N, D)]; 0 if all features are zero, nan if one is not finite.

    Source: RankMe, eq. (1), Garrido et al. 2022, arXiv:2210.02885v3; Roy and Vetterli 2007.
    Departs: From the Gram matrix of the shorter side, whose eigenvalues are the squared singular
        values: several times faster than a decomposition of the features.
    """
    x = features.double()
    if not x.isfinite().all():  # eigvalsh would raise before the loss is looked at
        return x.new_tensor(math.nan).float()
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = values.sum()
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -(shares * shares.clamp_min(torch.finfo(values.dtype).tiny).log()).sum()
    return torch.where(total > 0, entropy.exp(), 0.0).float()


class HealthCheck:
    """Looks at the metrics of each logging step, which are the same on every rank.

    Args:
        config: When to stop.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self._collapsed_for = 0

    def __call__(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Raise if training cannot come to anything.

        Raises:
            DivergedError: If the loss or the gradient norm is not finite.
            CollapsedError: If the features have been the same for all images for too long.
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
                f"health.min_feature_std=0 goes on regardless"
            )
