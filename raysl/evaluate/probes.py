"""The probes of frozen features: their settings, and their measurement for a seed.

The defaults belong to a version and never change within it: other defaults need another version.
See :mod:`raysl.evaluate.registry`.
"""

from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from raysl.config.base import Config, PositiveFloat, PositiveInt
from raysl.errors import DataError
from raysl.evaluate.knn import check_shapes, knn_predictions
from raysl.evaluate.linear import few_shot_rows, scale_features_on
from raysl.evaluate.logistic import LogisticRegression, fit_logistic
from raysl.evaluate.sgd_probe import SgdSettings, train_classifiers
from raysl.sources.source import Labels

_HELD_OUT = (
    3  # second element of the seed of the held-out rows, so that they differ from other draws
)
_Share = Annotated[float, Field(gt=0.0, lt=1.0)]
_FEWEST_ROWS = 2

Numbers = npt.NDArray[np.int64]


class KnnConfig(Config):
    """Weighted nearest neighbours (InstDisc, arXiv:1805.01978v1, sec. 3.4)."""

    k: PositiveInt = 20
    """Number of voting neighbours (DINO: 20, InstDisc: 200)."""
    also_k: tuple[PositiveInt, ...] = (10, 200)
    """Further numbers of neighbours to report, at no extra cost."""
    temperature: PositiveFloat = 0.07
    """A neighbour of cosine similarity s votes with exp(s / temperature)."""


class LinearConfig(Config):
    """A linear classifier by SGD, as in SimCLR; the rate is chosen on held-out training images."""

    base_lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        0.001,
        0.003,
        0.01,
        0.03,
        0.1,
        0.3,
        1.0,
    )
    """Learning rates for a batch of 256, scaled linearly with the batch; trained together in one
    pass."""
    epochs: PositiveInt = 100
    """Passes over the training features (MoCo: 100; SimCLR: 90)."""
    batch_size: PositiveInt = 256
    """Rows per step; the last step of an epoch takes the remainder."""
    sgd_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum without Nesterov; there is no weight decay."""
    held_out_share: _Share = 0.1
    """Share of the training rows used to choose the rate; test images are never used."""


class LbfgsConfig(Config):
    """Logistic regression by L-BFGS; one of several penalties is chosen on held-out images."""

    inverse_penalties: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    """C of scikit-learn's LogisticRegression, ascending; a single one is used as it is."""
    max_iterations: PositiveInt = 200
    """Maximal number of L-BFGS steps per penalty."""
    held_out_share: _Share = 0.1
    """Share of the training rows used to choose C."""


class FewShotConfig(Config):
    """Logistic regression on a few labels per class."""

    labels_per_class: PositiveInt = 5
    """Number of labelled images per class."""
    draws: PositiveInt = 5
    """Number of random draws of these labels; draw i is the same for every encoder."""
    inverse_penalty: PositiveFloat = 1.0
    """C of the logistic regressions."""


class ProbeSets(NamedTuple):
    """Frozen features with their labels."""

    train: npt.NDArray[np.float32]
    """``(M, D)``."""
    train_labels: Labels
    """``(M,)`` class numbers."""
    test: npt.NDArray[np.float32]
    """``(N, D)``."""
    test_labels: Labels
    """``(N,)``."""


class ProbeResult(NamedTuple):
    """The result of a protocol for one seed."""

    top1: float
    """Accuracy on the test images in [0, 1]; every row counts."""
    predictions: Numbers | None
    """``(N,)`` predicted class numbers; None if the protocol does not return them."""
    facts: dict[str, Any]
    """Further details, such as the chosen learning rate; JSON values."""


def measure_knn(config: KnnConfig, sets: ProbeSets, *, seed: int, device: str) -> ProbeResult:
    """Measure nearest neighbours; deterministic, whatever the seed.

    Raises:
        ShapeError: If the shapes do not fit or a set is empty.
    """
    train, labels, test, test_labels = (torch.from_numpy(x).to(device) for x in sets)
    check_shapes(train, labels, test, test_labels)
    ks = sorted({config.k, *config.also_k})
    predicted = knn_predictions(train, labels, test, ks=ks, temperature=config.temperature)
    accuracies = {k: _top1(predictions, sets.test_labels) for k, predictions in predicted.items()}
    others = {f"top1_of_k_{k}": accuracies[k] for k in ks if k != config.k}
    return ProbeResult(accuracies[config.k], predicted[config.k].cpu().numpy(), others)


def measure_linear(config: LinearConfig, sets: ProbeSets, *, seed: int, device: str) -> ProbeResult:
    """Train classifiers of all rates, choose one on the held-out rows, retrain it on all rows.

    Raises:
        DataError: If the classifier of the chosen rate diverges.
    """
    train, test = scale_features_on(sets.train, sets.test, device)
    all_labels = torch.from_numpy(sets.train_labels).to(device)
    classes, labels = torch.unique(all_labels, return_inverse=True)
    shared: dict[str, Any] = {
        "num_classes": len(classes),
        "settings": SgdSettings(config.epochs, config.batch_size, config.sgd_momentum),
        "seed": seed,
    }
    rates = config.base_lrs
    held_out_top1: list[float] = []
    best = 0
    if len(rates) > 1:
        held_out, rest = held_out_rows(len(train), share=config.held_out_share, seed=seed)
        candidates = train_classifiers(train[rest], labels[rest], base_lrs=rates, **shared)
        is_correct = candidates.predict(train[held_out]) == labels[held_out, None]
        held_out_top1 = is_correct.double().mean(dim=0).tolist()
        best = int(np.argmax(held_out_top1))
    final = train_classifiers(train, labels, base_lrs=[rates[best]], **shared)
    predictions = final.predict(test)[:, 0]
    if (predictions < 0).any():
        raise DataError(
            f"linear: the classifier of base_lr={rates[best]:g} diverges; set lower linear.base_lrs"
        )
    predictions = classes[predictions]
    facts = {"base_lr": rates[best], "held_out_top1": held_out_top1}
    return ProbeResult(_top1(predictions, sets.test_labels), predictions.cpu().numpy(), facts)


def measure_lbfgs(config: LbfgsConfig, sets: ProbeSets, *, seed: int, device: str) -> ProbeResult:
    """Fit classifiers of all penalties, choose one on the held-out rows, refit it on all rows."""
    train, test = scale_features_on(sets.train, sets.test, device)
    labels = torch.from_numpy(sets.train_labels).to(device)
    penalties = config.inverse_penalties
    held_out_top1: list[float] = []
    best = 0
    if len(penalties) > 1:
        held_out, rest = held_out_rows(len(train), share=config.held_out_share, seed=seed)
        classifier: LogisticRegression | None = None
        for penalty in penalties:  # each starts from the previous solution
            classifier = fit_logistic(
                train[rest],
                labels[rest],
                inverse_penalty=penalty,
                max_iterations=config.max_iterations,
                start=classifier,
            )
            is_correct = classifier.predict(train[held_out]) == labels[held_out]
            held_out_top1.append(float(is_correct.double().mean()))
        best = int(np.argmax(held_out_top1))
    final = fit_logistic(
        train, labels, inverse_penalty=penalties[best], max_iterations=config.max_iterations
    )
    predictions = final.predict(test)
    facts = {"inverse_penalty": penalties[best], "held_out_top1": held_out_top1}
    return ProbeResult(_top1(predictions, sets.test_labels), predictions.cpu().numpy(), facts)


def measure_few_shot(
    config: FewShotConfig, sets: ProbeSets, *, seed: int, device: str
) -> ProbeResult:
    """Fit a classifier to a few labels per class; ``seed`` is the number of the draw.

    Raises:
        DataError: If a class has too few labels.
    """
    train, test = scale_features_on(sets.train, sets.test, device)
    rows = few_shot_rows(
        sets.train_labels, labels_per_class=config.labels_per_class, seed=0, draw=seed
    )
    labels = torch.from_numpy(sets.train_labels[rows]).to(device)
    drawn = train[torch.from_numpy(rows).to(device)]
    classifier = fit_logistic(drawn, labels, inverse_penalty=config.inverse_penalty)
    predictions = classifier.predict(test)
    return ProbeResult(_top1(predictions, sets.test_labels), predictions.cpu().numpy(), {})


def held_out_rows(count: int, *, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split rows [0, count) at random into held-out rows and the others, each sorted.

    Raises:
        DataError: If there are fewer than two rows.
    """
    if count < _FEWEST_ROWS:
        raise DataError(f"{count} training rows are too few to hold some out")
    order = np.random.default_rng([seed, _HELD_OUT]).permutation(count)
    held_out = min(count - 1, max(1, round(share * count)))
    return (
        torch.from_numpy(np.sort(order[:held_out])),
        torch.from_numpy(np.sort(order[held_out:])),
    )


def _top1(predictions: Tensor, labels: Labels) -> float:
    return int((predictions.cpu().numpy() == labels).sum()) / len(labels)
