"""The margin loss of two gloo processes with half of the images each is that of one with all.

Each rank embeds images of its own, is paired with the other's, and pushes those away too: without
the sum over ranks in the backward pass of ``gather_batch`` the losses agree and gradients do not.
The same two processes also show that the memory bank of NCE is the same on both.
"""

from typing import Any

import pytest
import torch
from torch import nn
from two_ranks import RANKS, Results, mine

from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.methods.margin import Margin, MarginConfig, _partners
from raysl.methods.nce import NCE, NCEConfig
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import average_gradients, mean_over_ranks, rank_and_size

pytestmark = pytest.mark.distributed

TOTAL = 8
PROGRESS = Progress(step=3, total_steps=20, steps_per_epoch=5, seed=7)
TRAINING_SET = TrainingSet(64, TOTAL, (4, 4), class_counts=(30, 20, 10))
INDEX = torch.tensor([9, 3, 60, 2, 7, 3, 11, 0])
LABELS = torch.tensor([0, 1, -1, 0, 1, 1, 2, -1])
SETTINGS: dict[str, dict[str, Any]] = {
    "views": {"num_others": 5, "margin": 3.0},
    "sphere": {"num_others": 3, "margin": 1.5, "normalize": True},
    "labels": {"num_others": 7, "margin": 3.0, "pairs": "labels"},
}
NOISE = ("uniform", "labels", "gaussian")


def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh()), embed_dim=6)


def batch_of(num_views: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = [
        mine(torch.randn(TOTAL, 3, 4, 4, generator=generator, dtype=torch.float64))
        for _ in range(num_views)
    ]
    return Batch(views, mine(INDEX), mine(LABELS))


def step(name: str) -> Results:
    """Take the loss and gradients of a method, and those of its embeddings."""
    config = MarginConfig(projection_dim=4, **SETTINGS[name])
    method = Margin(config, backbone(), TRAINING_SET).double()
    batch = batch_of(2)
    features, z0, z1 = method.embeddings(batch, PROGRESS)
    z0.retain_grad()
    z1.retain_grad()
    output = method.loss_of((features, z0, z1), batch, PROGRESS)
    output.loss.backward()
    average_gradients(method.parameters())
    return {
        "loss": output.loss.detach(),
        "embedding_gradients": [z0.grad, z1.grad],
        "gradients": [p.grad for p in method.parameters() if p.requires_grad],
        "metrics": {key: mean_over_ranks(value) for key, value in output.metrics.items()},
        "partners": _partners(len(z0), 3, generator=PROGRESS.shared_generator()),
    }


def bank(noise: str) -> Results:
    """Take the state of NCE after two steps; one image stands on both ranks."""
    settings = {"projection_dim": 4, "num_noise": 50, "noise": noise}
    method = NCE(NCEConfig.model_validate(settings), backbone(), TRAINING_SET).double()
    for number in range(2):
        torch.manual_seed(number + 10 * rank_and_size()[0])  # noise is each rank's own
        method(batch_of(1), PROGRESS._replace(step=number))
        method.after_optimizer_step(PROGRESS._replace(step=number))
    return dict(method.named_buffers())


def everything() -> Results:
    found = {name: step(name) for name in SETTINGS}
    return found | {f"bank_{noise}": bank(noise) for noise in NOISE}


@pytest.mark.parametrize("name", SETTINGS)
class TestMargin:
    def test_mean_of_two_ranks_losses_is_that_of_one_batch(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        losses = [found[name]["loss"] for found in ranks]
        assert losses[0] != losses[1]
        torch.testing.assert_close(torch.stack(losses).mean(), alone[name]["loss"])

    def test_gradients_of_embeddings_and_parameters_are_those_of_one_batch(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        for view in range(2):
            found = torch.cat([result[name]["embedding_gradients"][view] for result in ranks])
            torch.testing.assert_close(found / RANKS, alone[name]["embedding_gradients"][view])
        for result in ranks:
            for found, expected in zip(
                result[name]["gradients"], alone[name]["gradients"], strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    def test_pairs_do_not_depend_on_the_number_of_ranks(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        both = torch.cat([result[name]["partners"] for result in ranks])
        assert torch.equal(both, alone[name]["partners"])


@pytest.mark.parametrize("noise", NOISE)
class TestBank:
    def test_is_the_same_on_both_ranks(self, ranks: list[Results], noise: str) -> None:
        first, second = (found[f"bank_{noise}"] for found in ranks)
        assert all(torch.equal(value, second[key]) for key, value in first.items())

    def test_is_that_of_one_process(self, ranks: list[Results], alone: Results, noise: str) -> None:
        found, expected = ranks[0][f"bank_{noise}"], alone[f"bank_{noise}"]
        assert (expected["bank_step"] == 1).sum() == TOTAL - 1
        for key, value in expected.items():
            if key != "log_normalizer":  # estimated from noise that is each rank's own
                torch.testing.assert_close(found[key], value)
