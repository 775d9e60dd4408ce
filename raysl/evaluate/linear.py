"""Scale frozen features for linear classifiers, and draw a few labels for each class."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.errors import DataError

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def scaled(train: Features, test: Features) -> tuple[Features, Features]:
    """Centre features by the training set's mean and divide by their overall deviation.

    One divisor for all dimensions, because those of little variance are mostly noise: with few
    labels, scaling each to unit variance costs bare pixels two points on the digits.
    """
    center = train.mean(axis=0)
    deviation = float(np.sqrt(np.mean((train - center) ** 2))) or 1.0
    return (train - center) / deviation, (test - center) / deviation


def scaled_on(
    train: Features, test: Features, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Scale features as :func:`scaled` does, on a device."""
    first, second = scaled(train, test)
    return torch.from_numpy(first).to(device), torch.from_numpy(second).to(device)


def few_shot_rows(
    labels: Labels, *, labels_per_class: int, seed: int, draw: int
) -> npt.NDArray[np.int64]:
    """Draw ``labels_per_class`` rows of each class, without replacement.

    Raises:
        DataError: If a class has fewer rows than that.
    """
    rng = np.random.default_rng([seed, draw])
    rows = []
    for number in np.unique(labels):
        members = np.flatnonzero(labels == number)
        if len(members) < labels_per_class:
            raise DataError(
                f"class {number} has {len(members)} labelled images, fewer than "
                f"few_shot.labels_per_class={labels_per_class}; lower it"
            )
        rows.append(rng.choice(members, labels_per_class, replace=False))
    return np.concatenate(rows)
