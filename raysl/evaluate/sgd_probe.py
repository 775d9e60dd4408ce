"""Train linear classifiers by SGD on frozen features, for many learning rates in one pass.

The linear evaluation of T. Chen et al. 2020, arXiv:2002.05709v3 (SimCLR), appendix B.6: SGD with
momentum, no regularisation, the rate falling along half a cosine. The learning rate is searched for
as in M. Oquab et al. 2023, arXiv:2304.07193v2 (DINOv2): classifiers of all rates see the same
batches at the same time.

Departs: features are computed once, from centred crops, not from random crops and flips in each
epoch: a hundred epochs cost as much as one. They are scaled by one number, which only changes the
unit of the rate. DINOv2 chooses the rate on the images that it reports; here they are held out of
the training images, and the classifier of the chosen rate is then trained on all of them (S.
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

_FIRST_STD = 0.01
_BASE_BATCH = 256
_ORDER = 2  # second word of the seed for the order of rows


class SgdSettings(NamedTuple):
    """How to train the classifiers."""

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
        """Predict class numbers ``(N, L)`` of features ``(N, D)``; -1 if one has diverged."""
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

    The loss is the mean cross-entropy of each. The gradient is computed explicitly, so that all
    share one product with the features in each direction.

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
    first = torch.randn(width, 1, num_classes, generator=generator) * _FIRST_STD
    weights = first.expand(width, num_rates, num_classes).contiguous().to(device)
    biases = torch.zeros(num_rates, num_classes, device=device)
    speeds = torch.zeros_like(weights), torch.zeros_like(biases)
    batch = min(settings.batch_size, count)
    total = settings.epochs * -(-count // batch)
    rates = torch.tensor(base_lrs, device=device)[:, None] * (batch / _BASE_BATCH)  # (L, 1)
    classifiers = LinearClassifiers(weights, biases)
    for step, rows in enumerate(_batches(count, batch, epochs=settings.epochs, seed=seed)):
        places = torch.from_numpy(rows).to(device)
        some = features[places]
        error = torch.softmax(classifiers._logits(some), dim=2)  # (B, L, C)
        error[torch.arange(len(rows), device=device), :, labels[places]] -= 1
        error /= len(rows)
        now = rates * (0.5 * (1 + math.cos(math.pi * step / total)))
        gradient = (some.T @ error.view(len(rows), -1)).view_as(weights)
        for values, speed, slope in zip(
            classifiers, speeds, (gradient, error.sum(dim=0)), strict=True
        ):
            speed.mul_(settings.sgd_momentum).add_(slope)
            values.sub_(now * speed)
    return classifiers


def _batches(count: int, batch: int, *, epochs: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of each step: a new order each epoch; the last step takes the remainder."""
    rng = np.random.default_rng([seed, _ORDER])
    for _ in range(epochs):
        order = rng.permutation(count)
        for start in range(0, count, batch):
            yield order[start : start + batch]


def _rows_at_once(biases: Tensor) -> int:
    return max(1, (1 << 25) // biases.numel())
