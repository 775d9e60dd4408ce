"""Train linear classifiers by SGD on frozen features, for many learning rates in one pass.

The linear evaluation of T. Chen et al. 2020, arXiv:2002.05709v3 (SimCLR), appendix B.6: SGD with
momentum, no regularisation, the rate falling along half a cosine. The learning rate is searched for
as in M. Oquab et al. 2023, arXiv:2304.07193v2 (DINOv2): classifiers of all rates see the same
batches at the same time.

Departs: features are computed once, from centred crops, not from random crops and flips in each
epoch, so the encoder runs once. Features are scaled by one number, which only rescales the learning
rate. DINOv2 chooses the rate on the images that it reports. Here, the rate is chosen on held-out
training images, and the classifier of that rate is then trained on all training images (S.
Kornblith et al. 2019, arXiv:1805.08974v3, appendix A.4).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.config.base import PositiveFloat

_INITIAL_STD = 0.01  # of the initial weights
_BASE_BATCH = 256
_LOGITS_AT_ONCE = 1 << 25  # 128 MiB of float32
_ORDER = 2  # second element of the seed of the order of rows, so that it differs from other draws


class SgdSettings(NamedTuple):
    """Settings that all classifiers share."""

    epochs: int
    batch_size: int
    sgd_momentum: float


class LinearClassifiers(NamedTuple):
    """One linear classifier for each rate."""

    weights: Tensor
    """``(D, L, C)`` float32."""
    biases: Tensor
    """``(L, C)`` float32."""

    def predict(self, features: Tensor) -> Tensor:
        """Predict class numbers ``(N, L)`` of features ``(N, D)``; -1 for a diverged classifier."""
        parts = [self._logits(some) for some in features.split(_rows_at_once(self.biases))]
        return torch.cat([torch.where(x.isfinite().all(dim=2), x.argmax(dim=2), -1) for x in parts])

    def _logits(self, features: Tensor) -> Tensor:
        width = self.weights.shape[0]
        return (features @ self.weights.view(width, -1)).view(-1, *self.biases.shape) + self.biases


@torch.no_grad()
def train_classifiers(
    features: Tensor,
    labels: Tensor,
    *,
    base_lrs: Sequence[PositiveFloat],
    num_classes: int,
    settings: SgdSettings,
    seed: int,
) -> LinearClassifiers:
    """Train a linear classifier for each learning rate, all on the same batches.

    The loss of each is the mean cross-entropy. The gradient is computed explicitly, so that all
    classifiers share one matrix product in the forward and one in the backward pass.

    Args:
        features: ``(M, D)`` float32, scaled. An epoch sees every row once.
        labels: ``(M,)`` int64 on the same device.
        base_lrs: Learning rates for a batch of 256; scaled linearly with the batch.
        num_classes: C, larger than every label.
        settings: Epochs, batch and momentum.
        seed: Seed of the initial weights and the order of rows.

    Returns:
        The classifiers, in the order of the rates.
    """
    count, width = features.shape
    device, num_rates = features.device, len(base_lrs)
    generator = torch.Generator().manual_seed(seed)
    initial = torch.randn(width, 1, num_classes, generator=generator) * _INITIAL_STD
    weights = initial.expand(width, num_rates, num_classes).contiguous().to(device)
    biases = torch.zeros(num_rates, num_classes, device=device)
    velocities = torch.zeros_like(weights), torch.zeros_like(biases)
    batch = min(settings.batch_size, count)
    total = settings.epochs * -(-count // batch)
    rates = torch.tensor(base_lrs, device=device)[:, None] * (batch / _BASE_BATCH)  # (L, 1)
    classifiers = LinearClassifiers(weights, biases)
    for step, rows in enumerate(_batches(count, batch, epochs=settings.epochs, seed=seed)):
        indices = torch.from_numpy(rows).to(device)
        batch_features = features[indices]
        error = torch.softmax(classifiers._logits(batch_features), dim=2)  # (B, L, C)
        error[torch.arange(len(rows), device=device), :, labels[indices]] -= 1
        error /= len(rows)
        current_rates = rates * (0.5 * (1 + math.cos(math.pi * step / total)))
        gradient = (batch_features.T @ error.view(len(rows), -1)).view_as(weights)
        for values, velocity, slope in zip(
            classifiers, velocities, (gradient, error.sum(dim=0)), strict=True
        ):
            velocity.mul_(settings.sgd_momentum).add_(slope)
            values.sub_(current_rates * velocity)
    return classifiers


def _batches(count: int, batch: int, *, epochs: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of each step: a new order each epoch; the last step takes the remainder."""
    rng = np.random.default_rng([seed, _ORDER])
    for _ in range(epochs):
        order = rng.permutation(count)
        for start in range(0, count, batch):
            yield order[start : start + batch]


def _rows_at_once(biases: Tensor) -> int:
    return max(1, _LOGITS_AT_ONCE // biases.numel())
