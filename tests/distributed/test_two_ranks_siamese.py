"""BYOL, SimSiam and MoCo v3 on two gloo processes with half of the images each, and on one.

In float64, with batch norm over all ranks.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import RANKS, Results, mine

from raysl.methods import load_method
from raysl.methods.base import Batch, Method, Progress, TrainingSet
from raysl.methods.byol import byol_loss
from raysl.methods.moco_v3 import moco_v3_loss
from raysl.methods.simsiam import simsiam_loss
from raysl.nn.backbones import Backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.collectives import mean_over_ranks, rank_and_size
from raysl.nn.vit import VisionTransformer

pytestmark = pytest.mark.distributed

IMAGES = 8
STEPS = 3
TRAINING_SET = TrainingSet(num_images=64, global_batch_size=IMAGES, view_sizes_px=(16, 16))
HEADS = {"hidden_dim": 12, "projection_dim": 6}
METHODS: dict[str, dict[str, Any]] = {
    "byol": {**HEADS, "ema_momentum": 0.6},
    "simsiam": {**HEADS, "predictor_hidden_dim": 4},
    "moco_v3": {**HEADS, "ema_momentum": 0.6},
    "moco_v3_vit": {**HEADS, "ema_momentum": 0.6},
}
LOSSES = {
    "byol": byol_loss,
    "simsiam": simsiam_loss,
    "moco_v3": lambda query, key: moco_v3_loss(query, key, temperature=0.2),
}


def numbers(*shape: int, seed: int) -> Tensor:
    """Rows that differ in mean and spread, so that each half has statistics of its own."""
    rows = torch.linspace(0.3, 2.5, shape[0]).view(-1, *[1] * (len(shape) - 1)).double()
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return noise * rows + rows


def compare(name: str) -> Results:
    """The loss of half of the rows, or of all, and its gradient."""
    online = mine(numbers(IMAGES, 5, seed=0) - 1.0).requires_grad_()
    loss = LOSSES[name](online, mine(numbers(IMAGES, 5, seed=1) - 1.0))
    loss.backward()
    return {"loss": loss.detach(), "gradient": online.grad}


def build(name: str) -> Method:
    torch.manual_seed(0)
    net: nn.Module
    if name.endswith("_vit"):
        net = VisionTransformer(
            image_size_px=16, patch_size_px=8, embed_dim=8, depth=1, num_heads=2
        )
    else:
        layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    kind = load_method(name.removesuffix("_vit"))
    method = kind(kind.Config(**METHODS[name]), Backbone(net, embed_dim=8), TRAINING_SET)
    set_batch_norm_scope(method, "sync")
    return method.double()


def train_steps(name: str) -> Results:
    """Take steps: the losses after the first one show weights and moving averages."""
    method = build(name)
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    found: Results = {"losses": [], "gradients": []}
    for step in range(STEPS):
        views = [mine(numbers(IMAGES, 3, 16, 16, seed=10 * step + view)) for view in range(2)]
        progress = Progress(step, STEPS, 2, seed=1)
        output = model(Batch(views, mine(torch.arange(IMAGES))), progress)
        optimizer.zero_grad()
        output.loss.backward()
        found["losses"].append(mean_over_ranks(output.loss.detach()))
        found["gradients"].append([p.grad.clone() for p in trainable])
        optimizer.step()
        method.after_optimizer_step(progress)
    found["state"] = method.state_dict()
    return found


def everything() -> Results:
    return {
        "compared": {name: compare(name) for name in LOSSES},
        "trained": {name: train_steps(name) for name in METHODS},
    }


def assert_equal_to_scale(found: Tensor, expected: Tensor, *, scale: float) -> None:
    """Equal up to 1e-10 times the largest number expected."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-10 * scale)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_two_ranks_equals_one_big_batch_in_value_and_gradient(
    ranks: list[Results], alone: Results, name: str
) -> None:
    expected = alone["compared"][name]
    both = [found["compared"][name] for found in ranks]
    assert both[0]["loss"] != both[1]["loss"]  # each is the mean over the rank's own images
    torch.testing.assert_close((both[0]["loss"] + both[1]["loss"]) / RANKS, expected["loss"])
    gradient = torch.cat([found["gradient"] for found in both]) / RANKS
    assert_equal_to_scale(gradient, expected["gradient"], scale=1.0)


@pytest.mark.parametrize("name", METHODS)
class TestMethod:
    def test_two_ranks_equal_one_big_batch_in_every_loss(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        for found in ranks:
            torch.testing.assert_close(
                found["trained"][name]["losses"], alone["trained"][name]["losses"]
            )

    def test_two_ranks_equal_one_big_batch_in_every_gradient_of_every_step(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        for step, expected in enumerate(alone["trained"][name]["gradients"]):
            scale = max(float(gradient.abs().max()) for gradient in expected)
            assert scale > 1e-4
            for found in ranks:
                gradients = found["trained"][name]["gradients"][step]
                for gradient, whole in zip(gradients, expected, strict=True):
                    assert_equal_to_scale(gradient, whole, scale=scale)

    def test_both_ranks_end_in_the_state_of_one(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        """Weights, moving averages and running statistics, bit for bit on both ranks."""
        first, second = (found["trained"][name]["state"] for found in ranks)
        expected = alone["trained"][name]["state"]
        assert first.keys() == second.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-10)
