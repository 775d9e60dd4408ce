"""Two gloo processes with half of the images each equal one process, for energy-based models.

What is random on each rank is given its part of the same numbers here; which chains of the replay
buffer go on, and from which noise others start, is the same by itself.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import Results, mine

from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.methods.ebm import EBM, EBMConfig
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import mean_over_ranks, rank_and_size

pytestmark = pytest.mark.distributed

IMAGES = 8
SIZE_PX = 12
STEPS = 3
TRAININGS: dict[str, dict[str, Any]] = {
    "mcmc": {
        "buffer_length": 12, "restart_prob": 0.5, "langevin_steps": 3, "langevin_noise_std": 0.0,
        "energy_regularisation": 0.1,
    },
    "score_matching": {"noise_std_range": (0.3, 0.3)},
    "nce": {"num_noise": 2},
}  # fmt: skip


def numbers(*shape: int, seed: int) -> Tensor:
    """Rows that differ in mean and spread, so that each half has statistics of its own."""
    rows = torch.linspace(0.3, 1.5, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * rows).double()


def train(training: str) -> Results:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    backbone = Backbone(net, embed_dim=6)
    config = EBMConfig(training=training, hidden_dim=8, **TRAININGS[training])
    method = EBM(config, backbone, TrainingSet(64, IMAGES, (SIZE_PX,)))
    method.double()  # in float32, rounding turns a few ReLUs
    if method.buffer is not None:
        method.buffer.samples = method.buffer.samples.half()
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.02)
    found: Results = {"losses": []}
    for step in range(STEPS):
        progress = Progress(step, 10, 5, seed=1)
        images = mine(numbers(IMAGES, 3, SIZE_PX, SIZE_PX, seed=10 * step))
        noise = mine(numbers(IMAGES, 3, SIZE_PX, SIZE_PX, seed=10 * step + 1))
        model_noise = mine(numbers(2 * IMAGES, 3, SIZE_PX, SIZE_PX, seed=10 * step + 2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda _, noise=noise: noise)
            if method.noise is not None:
                patch.setattr(method.noise, "sample", lambda _, noise=model_noise: noise)
            output = model(Batch([images], torch.arange(len(images))), progress)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_optimizer_step(progress)
        found["losses"].append(mean_over_ranks(output.loss.detach()))
        if step == STEPS - 1:
            found["gradients"] = [p.grad.clone() for p in method.parameters()]
    return found | {"buffers": dict(method.named_buffers())}


def everything() -> Results:
    return {training: train(training) for training in TRAININGS}


@pytest.mark.parametrize("training", TRAININGS)
class TestTwoRanks:
    def test_equal_one_big_batch_in_loss(
        self, ranks: list[Results], alone: Results, training: str
    ) -> None:
        for found in ranks:
            torch.testing.assert_close(
                found[training]["losses"], alone[training]["losses"], rtol=1e-5, atol=1e-6
            )

    def test_equal_one_big_batch_in_every_gradient(
        self, ranks: list[Results], alone: Results, training: str
    ) -> None:
        expected = alone[training]["gradients"]
        scale = max(float(gradient.abs().max()) for gradient in expected)
        for found in ranks:
            for gradient, whole in zip(found[training]["gradients"], expected, strict=True):
                torch.testing.assert_close(gradient, whole, rtol=0.0, atol=1e-5 * scale)

    def test_hold_the_same_state_bit_for_bit(self, ranks: list[Results], training: str) -> None:
        assert all(map(torch.equal, *(found[training]["gradients"] for found in ranks)))
        first, second = (found[training]["buffers"] for found in ranks)
        assert all(torch.equal(value, second[key]) for key, value in first.items())


class TestState:
    def test_replay_buffer_is_that_of_one_process(
        self, ranks: list[Results], alone: Results
    ) -> None:
        """The same chains went on or started again, and ended in the same places."""
        expected = alone["mcmc"]["buffers"]
        assert len(set(expected["buffer.num_steps"].tolist())) > 2
        for found in ranks:
            buffers = found["mcmc"]["buffers"]
            assert torch.equal(buffers["buffer.num_steps"], expected["buffer.num_steps"])
            torch.testing.assert_close(
                buffers["buffer.samples"], expected["buffer.samples"], rtol=2e-3, atol=2e-3
            )

    def test_noise_is_fitted_to_the_images_of_all_ranks(
        self, ranks: list[Results], alone: Results
    ) -> None:
        expected = alone["nce"]["buffers"]
        assert expected["noise.count"].item() == 1 + STEPS * IMAGES
        for found in ranks:
            for key, value in expected.items():
                torch.testing.assert_close(found["nce"]["buffers"][key], value, msg=key)
