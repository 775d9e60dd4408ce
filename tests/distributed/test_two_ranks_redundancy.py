"""Barlow Twins, VICReg and SwAV on two gloo processes equal one process with all images.

Both ranks hold the same loss
of all images, or the mean over their own; either way the mean over ranks of loss and gradient must
be that of one big batch.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import RANKS, Results, mine

from raysl.config.base import Duration
from raysl.methods import load_method
from raysl.methods.barlow import Barlow, barlow_loss
from raysl.methods.base import Batch, Method, Progress, TrainingSet
from raysl.methods.swav import sinkhorn_codes
from raysl.methods.vicreg import vicreg_loss
from raysl.nn.backbones import Backbone
from raysl.nn.batchnorm import SyncBatchNorm, set_batch_norm_scope
from raysl.nn.collectives import (
    average_gradients,
    mean_over_ranks,
    rank_and_size,
    sum_over_ranks,
)

pytestmark = pytest.mark.distributed

IMAGES = 12
STEPS = 4
DATA = TrainingSet(num_images=64, global_batch_size=IMAGES, view_sizes_px=(8, 8))
SIZES_PX = {"barlow": (8, 8), "vicreg": (8, 8), "swav": (8, 8, 5, 5, 5), "swav_queue": (8, 8)}
HEAD = {"hidden_dim": 8, "projection_dim": 5}
METHODS: dict[str, dict[str, Any]] = {
    "barlow": HEAD | {"redundancy": 0.1, "loss_scale": 1.0},
    "vicreg": HEAD,
    "swav": HEAD | {"num_prototypes": 7, "frozen": Duration(steps=0)},
    "swav_queue": HEAD
    | {
        "num_prototypes": 7,
        "frozen": Duration(steps=0),
        "queue_length": 20,
        "queue_start": Duration(steps=1),
    },
}


def numbers(*shape: int, seed: int) -> Tensor:
    """Rows that differ in mean and spread, so that each half has statistics of its own."""
    rows = torch.linspace(0.3, 2.5, shape[0]).view(-1, *[1] * (len(shape) - 1)).double()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * rows + rows


def losses() -> Results:
    """The two losses that sum over ranks, and the gradients of this rank's rows."""
    found: Results = {}
    for name, loss_of in (
        ("barlow", lambda a, b: barlow_loss(a, b, redundancy=0.1)),
        ("vicreg", lambda a, b: vicreg_loss(a, b, similarity=25, variance=25, covariance=1)),
    ):
        z0, z1 = (mine(0.3 * numbers(IMAGES, 5, seed=seed)).requires_grad_() for seed in (0, 1))
        loss = loss_of(z0, z1)
        loss.backward()
        found[name] = {"loss": loss.detach(), "gradients": [z0.grad, z1.grad]}
    scores = mine(numbers(IMAGES, 7, seed=2).tanh())
    queue = numbers(9, 7, seed=3).tanh()
    found["codes"] = [
        sinkhorn_codes(scores, epsilon=0.05, iterations=3),
        sinkhorn_codes(scores, epsilon=0.05, iterations=3, queue_scores=queue),
    ]
    return found


def method_of(name: str) -> Method:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    backbone = Backbone(nn.Sequential(*layers, nn.Flatten()), embed_dim=6)
    kind = load_method(name.split("_", maxsplit=1)[0])
    method = kind(kind.Config(**METHODS[name]), backbone, DATA)
    set_batch_norm_scope(method, "sync")
    return method.double()  # in float32, rounding turns a few ReLUs, and with them the gradient


def batch_at(step: int, name: str) -> Batch:
    views = [
        mine(numbers(IMAGES, 3, size, size, seed=10 * step + view))
        for view, size in enumerate(SIZES_PX[name])
    ]
    return Batch(views, mine(torch.arange(IMAGES)))


def gradients_of_barlow_by_its_authors() -> list[Tensor]:
    """The first step's, in the arithmetic of the authors' main.py (BarlowTwins.forward).

    Batch norm is synchronised, with its gradient; the correlations of all ranks are added up by an
    all-reduce in place, which autograd does not see; data-parallel training takes the mean.
    """
    method = method_of("barlow")
    assert isinstance(method, Barlow)
    norm = SyncBatchNorm(HEAD["projection_dim"], affine=False).double()
    z0, z1 = (method.projector(method.backbone(view)) for view in batch_at(0, "barlow").views)
    mine_only = norm(z0).T @ norm(z1) / IMAGES
    correlation = mine_only + (sum_over_ranks(mine_only.detach()) - mine_only.detach())
    eye = torch.eye(len(correlation)).bool()
    ((correlation[eye] - 1).square().sum() + 0.1 * correlation[~eye].square().sum()).backward()
    average_gradients(method.parameters())
    return [p.grad for p in method.parameters() if p.grad is not None]


def train_steps(name: str) -> Results:
    """Take steps, so that the last shows the prototypes' and the queue's."""
    method = method_of(name)
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.02)
    found: Results = {"losses": [], "gradients": [], "metrics": []}
    for step in range(STEPS):
        progress = Progress(step, 10, 5, seed=1)
        optimizer.zero_grad()
        output = model(batch_at(step, name), progress)
        output.loss.backward()
        method.before_optimizer_step(progress)
        found["gradients"].append([p.grad.clone() for p in trainable])
        optimizer.step()
        method.after_optimizer_step(progress)
        found["losses"].append(mean_over_ranks(output.loss.detach()))
        found["metrics"].append({k: mean_over_ranks(v) for k, v in output.metrics.items()})
    found["buffers"] = dict(method.named_buffers())
    return found


def everything() -> Results:
    """Compute what must not depend on how many processes share the work."""
    found = {"losses": losses(), "barlow by its authors": gradients_of_barlow_by_its_authors()}
    return found | {name: train_steps(name) for name in METHODS}


@pytest.mark.parametrize("name", ["barlow", "vicreg"])
class TestLoss:
    def test_mean_over_ranks_equals_one_big_batch_in_value_and_gradient(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        expected = alone["losses"][name]
        found = torch.stack([each["losses"][name]["loss"] for each in ranks])
        torch.testing.assert_close(found.mean(), expected["loss"], rtol=1e-12, atol=0.0)
        for view in range(2):
            rows = [each["losses"][name]["gradients"][view] for each in ranks]
            # Of the sum of the ranks' losses; their mean is what is minimised.
            gradient = torch.cat(rows) / RANKS
            torch.testing.assert_close(gradient, expected["gradients"][view], rtol=1e-9, atol=1e-12)

    def test_halves_on_their_own_would_have_given_something_else(
        self, alone: Results, name: str
    ) -> None:
        z0, z1 = (0.3 * numbers(IMAGES, 5, seed=seed) for seed in (0, 1))
        halves = [
            barlow_loss(a, b, redundancy=0.1)
            if name == "barlow"
            else vicreg_loss(a, b, similarity=25, variance=25, covariance=1)
            for a, b in zip(z0.chunk(RANKS), z1.chunk(RANKS), strict=True)
        ]
        expected = alone["losses"][name]["loss"]
        assert (torch.stack(halves).mean() - expected).abs() > 0.01 * expected


class TestSinkhornCodes:
    @pytest.mark.parametrize("queue", [0, 1], ids=["no queue", "queue"])
    def test_of_each_rank_are_those_of_one_big_batch(
        self, ranks: list[Results], alone: Results, queue: int
    ) -> None:
        found = torch.cat([each["losses"]["codes"][queue] for each in ranks])
        torch.testing.assert_close(found, alone["losses"]["codes"][queue])


@pytest.mark.parametrize("name", METHODS)
class TestMethod:
    def test_two_ranks_equal_one_big_batch_in_loss_and_metrics(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        for found in ranks:
            torch.testing.assert_close(found[name]["losses"], alone[name]["losses"])
            torch.testing.assert_close(found[name]["metrics"], alone[name]["metrics"])

    def test_two_ranks_equal_one_big_batch_in_every_gradient_of_every_step(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        for step in range(STEPS):
            expected = alone[name]["gradients"][step]
            scale = max(float(gradient.abs().max()) for gradient in expected)
            for found in ranks:
                for gradient, whole in zip(found[name]["gradients"][step], expected, strict=True):
                    torch.testing.assert_close(gradient, whole, rtol=0.0, atol=1e-8 * scale)

    def test_both_ranks_end_with_the_same_buffers(self, ranks: list[Results], name: str) -> None:
        first, second = (found[name]["buffers"] for found in ranks)
        assert all(torch.equal(value, second[key]) for key, value in first.items())


class TestBarlowByItsAuthors:
    def test_on_one_process_has_the_same_gradient(self, alone: Results) -> None:
        theirs, ours = alone["barlow by its authors"], alone["barlow"]["gradients"][0]
        torch.testing.assert_close(theirs, ours, rtol=1e-7, atol=1e-10)

    def test_on_two_ranks_has_half_of_it_which_a_loss_scale_of_a_half_gives(
        self, ranks: list[Results]
    ) -> None:
        for found in ranks:
            theirs, ours = found["barlow by its authors"], found["barlow"]["gradients"][0]
            scaled = [gradient / RANKS for gradient in ours]
            torch.testing.assert_close(theirs, scaled, rtol=1e-7, atol=1e-10)


class TestQueue:
    def test_of_two_ranks_equals_that_of_one(self, ranks: list[Results], alone: Results) -> None:
        expected = alone["swav_queue"]["buffers"]["queue"]
        assert expected.norm(dim=2).min() > 0.99  # 3 steps of 12 images filled 20 places
        for found in ranks:
            torch.testing.assert_close(found["swav_queue"]["buffers"]["queue"], expected)
