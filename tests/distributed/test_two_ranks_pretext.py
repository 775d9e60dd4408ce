"""Rotation, jigsaw, MAE and context encoders on two gloo processes equal one process.

Their losses are means over images, so data-parallel training averages them exactly, in float64 and
with batch norm over all ranks. What is random for each image (turns, puzzles, masks) is drawn here
for all images, and each rank takes its part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import Results, mine

from raysl.methods import load_method
from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.nn.backbones import Backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.collectives import mean_over_ranks, rank_and_size
from raysl.nn.vit import VisionTransformer

pytestmark = pytest.mark.distributed

IMAGES = 8
SIZE_PX = 32
TRAINING_SET = TrainingSet(num_images=64, global_batch_size=IMAGES, view_sizes_px=(SIZE_PX,))
PAINTER = {
    "name": "context_encoder",
    "bottleneck_dim": 8,
    "decoder_width": 4,
    "discriminator_width": 4,
    "adversarial_weight": 0.5,
}
CASES: dict[str, dict[str, Any]] = {
    "all turns": {"name": "rotation"},
    "one turn": {"name": "rotation", "rotations": "one"},
    "jigsaw": {"name": "jigsaw", "grid": 2, "tile_dim": 6},
    "mae": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "square hole": PAINTER,
    "holes of any shape": PAINTER | {"mask": "region"},
}


def backbone(name: str) -> Backbone:
    if name == "mae":
        vit = VisionTransformer(
            image_size_px=SIZE_PX, patch_size_px=8, embed_dim=12, depth=1, num_heads=2
        )
        return Backbone(vit, embed_dim=12)
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    return Backbone(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), embed_dim=8)


def images() -> Tensor:
    """This rank's; they differ in mean and spread, so that each half has statistics of its own."""
    shape, generator = (IMAGES, 3, SIZE_PX, SIZE_PX), torch.Generator().manual_seed(1)
    rows = torch.linspace(0.3, 2.5, IMAGES).view(-1, 1, 1, 1)
    return mine((torch.randn(*shape, generator=generator) * rows + rows).double())


@contextmanager
def one_draw_for_all_ranks() -> Iterator[None]:
    """Draw for the images of all ranks and return this rank's; both functions begin with N."""
    rand, randint, size = torch.rand, torch.randint, rank_and_size()[1]

    def part_of_rand(*shape: Any, **options: Any) -> Tensor:
        n, *rest = shape if len(shape) > 1 else shape[0]
        return mine(rand(size * n, *rest, **options))

    def part_of_randint(high: int, shape: tuple[int, ...], **options: Any) -> Tensor:
        return mine(randint(high, (size * shape[0], *shape[1:]), **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", part_of_rand)
        patch.setattr(torch, "randint", part_of_randint)
        yield


def train_step(settings: dict[str, Any]) -> Results:
    torch.manual_seed(0)
    kind = load_method(settings["name"])
    method = kind(kind.Config(**settings), backbone(settings["name"]), TRAINING_SET)
    set_batch_norm_scope(method, "sync")
    method.double()  # in float32, rounding turns a few ReLUs, and with them the gradient
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    torch.manual_seed(3)
    with one_draw_for_all_ranks():
        batch = Batch([images()], mine(torch.arange(IMAGES)))
        output = model(batch, Progress(step=0, total_steps=10, steps_per_epoch=5, seed=1))
    total = output.loss
    losses = [output.loss.detach()]
    if output.adversary_loss is not None:
        total = total + output.adversary_loss
        losses.append(output.adversary_loss.detach())
    total.backward()
    return {
        "mine": losses[0],
        "losses": [mean_over_ranks(loss) for loss in losses],
        "gradients": [p.grad for p in method.parameters() if p.requires_grad],
        "buffers": dict(method.named_buffers()),
    }


def everything() -> Results:
    return {case: train_step(settings) for case, settings in CASES.items()}


@pytest.mark.parametrize("case", CASES)
class TestTwoRanks:
    def test_have_the_loss_of_one_big_batch_and_each_its_own_part_of_it(
        self, ranks: list[Results], alone: Results, case: str
    ) -> None:
        assert ranks[0][case]["mine"] != ranks[1][case]["mine"]
        for found in ranks:
            torch.testing.assert_close(
                found[case]["losses"], alone[case]["losses"], rtol=1e-10, atol=0.0
            )

    def test_have_the_gradient_of_one_big_batch(
        self, ranks: list[Results], alone: Results, case: str
    ) -> None:
        expected = alone[case]["gradients"]
        scale = max(float(gradient.abs().max()) for gradient in expected)
        for found in ranks:
            for gradient, whole in zip(found[case]["gradients"], expected, strict=True):
                torch.testing.assert_close(gradient, whole, rtol=0.0, atol=1e-10 * scale)

    def test_have_its_statistics_of_batch_norm(
        self, ranks: list[Results], alone: Results, case: str
    ) -> None:
        for found in ranks:
            torch.testing.assert_close(found[case]["buffers"], alone[case]["buffers"])
