"""Logistic regression on frozen features, with all labels or a few for each class."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.errors import DataError
from raysl.evaluate.logistic import fit_logistic

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Score(NamedTuple):
    """A mean accuracy in [0, 1] and its standard deviation over draws."""

    mean: float
    deviation: float


def linear_accuracy(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    test_labels: Labels,
    *,
    inverse_penalty: float = 1.0,
) -> float:
    """Return the test accuracy of a linear classifier trained on all labelled features.

    Args:
        train_features: ``(M, D)`` float.
        train_labels: ``(M,)`` class numbers.
        test_features: ``(N, D)`` float.
        test_labels: ``(N,)`` class numbers.
        inverse_penalty: C of scikit-learn's logistic regression (L2 penalty, at most 200 steps of
            L-BFGS) on features scaled by :func:`scaled`.

    Returns:
        Accuracy in [0, 1].
    """
    train, test = scaled(train_features, test_features)
    return _fit_and_score(train, train_labels, test, test_labels, inverse_penalty)


def few_shot_accuracy(
    train_features: Features,
    train_labels: Labels,
    test_features: Features,
    test_labels: Labels,
    *,
    labels_per_class: int,
    num_draws: int,
    seed: int = 0,
    inverse_penalty: float = 1.0,
) -> Score:
    """Return the mean test accuracy of linear classifiers trained on a few labels of each class.

    Args:
        train_features: ``(M, D)`` float; all of them, unlabelled, set the scale.
        train_labels: ``(M,)`` class numbers.
        test_features: ``(N, D)`` float.
        test_labels: ``(N,)`` class numbers.
        labels_per_class: Labelled images of each class, drawn at random.
        num_draws: Independent draws; draw i is a function of ``seed`` and i, so that two encoders
            are compared on the same images.
        seed: Seed of the draws.
        inverse_penalty: C of scikit-learn's logistic regression.

    Raises:
        DataError: If a class has fewer images than that.
    """
    train, test = scaled(train_features, test_features)
    accuracies = [
        _fit_and_score(train[rows], train_labels[rows], test, test_labels, inverse_penalty)
        for rows in (
            few_shot_rows(train_labels, labels_per_class=labels_per_class, seed=seed, draw=draw)
            for draw in range(num_draws)
        )
    ]
    return Score(float(np.mean(accuracies)), float(np.std(accuracies)))


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
                f"evaluate.few_shot_labels={labels_per_class}; lower it"
            )
        rows.append(rng.choice(members, labels_per_class, replace=False))
    return np.concatenate(rows)


def _fit_and_score(
    train: Features, train_labels: Labels, test: Features, test_labels: Labels, penalty: float
) -> float:
    classifier = fit_logistic(
        torch.from_numpy(train), torch.from_numpy(train_labels), inverse_penalty=penalty
    )
    predictions = classifier.predict(torch.from_numpy(test)).numpy()
    return float((predictions == test_labels).mean())
