import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.evaluate.sgd_probe import SgdSettings, _batches, train_classifiers

SETTINGS = SgdSettings(epochs=3, batch_size=16, sgd_momentum=0.9)


def data(n: int = 50, d: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, d, generator=generator)
    return centers[labels] + torch.randn(n, d, generator=generator), labels


def trained_by_torch(features: Tensor, labels: Tensor, *, base_lr: float, seed: int) -> Tensor:
    """The same with torch.optim.SGD and autograd, one rate alone, in float64."""
    first = torch.randn(features.shape[1], 1, 3, generator=torch.Generator().manual_seed(seed))
    weights = (first[:, 0] * 0.01).double().requires_grad_()
    biases = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights, biases], lr=1.0, momentum=SETTINGS.sgd_momentum)
    steps = list(_batches(len(features), 16, epochs=SETTINGS.epochs, seed=seed))
    rows_of = [torch.from_numpy(rows) for rows in steps]
    for step, rows in enumerate(rows_of):
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(rows_of)))
        optimizer.param_groups[0]["lr"] = base_lr * 16 / 256 * cosine
        optimizer.zero_grad()
        logits = features[rows].double() @ weights + biases
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
    return torch.cat([weights, biases[None]]).detach().float()


def test_each_rate_is_trained_as_if_it_were_alone() -> None:
    features, labels = data()
    rates = [0.1, 1.0, 5.0]
    found = train_classifiers(
        features, labels, base_lrs=rates, num_classes=3, settings=SETTINGS, seed=4
    )
    for place, rate in enumerate(rates):
        ours = torch.cat([found.weights[:, place], found.biases[None, place]])
        expected = trained_by_torch(features, labels, base_lr=rate, seed=4)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("count", "batch"), [(50, 16), (48, 16), (7, 7), (17, 16)])
def test_every_row_is_seen_once_an_epoch(count: int, batch: int) -> None:
    """Also those of the last step, which is not full."""
    steps = list(_batches(count, batch, epochs=2, seed=0))
    per_epoch = -(-count // batch)
    assert len(steps) == 2 * per_epoch
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(count))
    assert np.concatenate(steps[:per_epoch]).tolist() != np.concatenate(steps[per_epoch:]).tolist()


def test_a_rate_that_diverges_harms_no_other_and_says_so() -> None:
    features, labels = data()
    alone, beside = (
        train_classifiers(
            features * 1e3, labels, base_lrs=rates, num_classes=3, settings=SETTINGS, seed=0
        )
        for rates in ([1e-3], [1e-3, 1e38])
    )
    torch.testing.assert_close(beside.weights[:, :1], alone.weights)
    predictions = beside.predict(features)
    assert (predictions[:, 1] == -1).any()
    assert (predictions[:, 0] >= 0).all()


def test_is_a_function_of_the_seed() -> None:
    features, labels = data()

    def weights(seed: int) -> Tensor:
        return train_classifiers(
            features, labels, base_lrs=[1.0], num_classes=3, settings=SETTINGS, seed=seed
        ).weights

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
