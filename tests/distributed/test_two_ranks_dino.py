"""DINO on two gloo processes that hold half of the images each equals one process with all.

Its center is the mean of all ranks' outputs: a center of one rank's own images would agree in the
loss of the first step only.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import RANKS, Results, mine

from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.methods.dino import DINO, DINOConfig
from raysl.nn.backbones import Backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.collectives import mean_over_ranks, rank_and_size

pytestmark = pytest.mark.distributed

PER_RANK = 4
STEPS = 3


def build() -> DINO:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    config = DINOConfig(
        hidden_dim=8,
        bottleneck_dim=5,
        num_prototypes=7,
        ema_momentum=0.5,
        center_momentum=0.5,
        head_batch_norm=True,
    )
    method = DINO(config, Backbone(net, embed_dim=6), TrainingSet(64, 8, (12, 12, 8)))
    set_batch_norm_scope(method, "sync")
    return method.double()


def batch_of(step: int) -> Batch:
    """This rank's half of the step's images; all of them in a process on its own."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.linspace(0.3, 2.5, RANKS * PER_RANK).view(-1, 1, 1, 1)

    def view(side: int) -> Tensor:
        pixels = torch.randn(RANKS * PER_RANK, 3, side, side, generator=generator)
        return mine((pixels * rows + rows).double())

    return Batch([view(12), view(12), view(8)], mine(torch.arange(len(rows))))


def everything() -> Results:
    method = build()
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    found: Results = {"losses": [], "gradients": [], "centers": []}
    for step in range(STEPS):
        progress = Progress(step, 10, 1, seed=1)  # the prototypes move from step 1 on
        output = model(batch_of(step), progress)
        optimizer.zero_grad()
        output.loss.backward()
        found["gradients"] += [p.grad.clone() for p in trainable if p.grad is not None]
        method.before_optimizer_step(progress)
        optimizer.step()
        method.after_optimizer_step(progress)
        found["losses"].append(mean_over_ranks(output.loss.detach()))
        found["centers"].append(method.center.clone())
    found["teacher"] = [p.clone() for p in method.teacher.parameters()]
    return found


@pytest.mark.parametrize("what", ["losses", "gradients", "centers", "teacher"])
def test_two_ranks_equal_one_big_batch(ranks: list[Results], alone: Results, what: str) -> None:
    scale = max(float(value.abs().max()) for value in alone[what])
    for found in ranks:
        for value, expected in zip(found[what], alone[what], strict=True):
            torch.testing.assert_close(value, expected, rtol=0.0, atol=1e-6 * scale)


def test_both_ranks_hold_the_same_center_and_it_has_moved(ranks: list[Results]) -> None:
    first, second = (found["centers"] for found in ranks)
    assert all(map(torch.equal, first, second))
    assert first[0].abs().max() > 0.01
    assert not torch.equal(first[0], first[1])
