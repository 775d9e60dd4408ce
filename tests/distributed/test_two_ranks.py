"""Two gloo processes that hold half of the images each equal one process with all of them.

Without the sum over ranks in the backward pass of ``gather_batch`` or of ``SyncBatchNorm`` the
losses here still agree and the gradients do not.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import RANKS, Results, mine

import raysl.nn.contrast
from raysl.evaluate.features import EvalImages, embed
from raysl.methods import load_method
from raysl.methods.base import Batch, Method, Progress, TrainingSet
from raysl.methods.sigmoid import sigmoid_loss
from raysl.methods.simclr import nt_xent_loss
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.collectives import (
    barrier,
    broadcast_object,
    gather_batch,
    gather_batch_no_grad,
    mean_over_ranks,
    rank_and_size,
    sum_over_ranks,
)
from raysl.sources.source import ArraySource
from raysl.train.gradient import backward

pytestmark = pytest.mark.distributed

PER_RANK = 4
TRAINING_SET = TrainingSet(
    num_images=64, global_batch_size=RANKS * PER_RANK, view_sizes_px=(32, 32)
)
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"temperature": 0.5, "projection_dim": 16},
    "moco": {"queue_length": 20, "projection_dim": 16, "ema_momentum": 0.9},
    "moco_symmetric": {
        "queue_length": 24, "projection_dim": 16, "ema_momentum": 0.9, "symmetric": True
    },
    "simclr_memory": {
        "memory": True, "memory_length": 20, "projection_dim": 16, "ema_momentum": 0.9
    },
    "sigmoid": {"projection_dim": 16, "initial_bias": -2.0},
}  # fmt: skip
NUM_STEPS = {"simclr": 1, "moco": 2, "moco_symmetric": 1, "simclr_memory": 2, "sigmoid": 1}
TILES = (3, 1024)  # rows and keys of a tile: several, and one for all
EVAL_SIZES = (1, 6, 7)
NORMS: dict[str, tuple[type[nn.Module], tuple[int, ...], torch.dtype]] = {
    "images": (nn.BatchNorm2d, (8, 3, 5, 5), torch.float32),
    "vectors": (nn.BatchNorm1d, (8, 3), torch.float32),
    "float64": (nn.BatchNorm2d, (8, 3, 5, 5), torch.float64),
}


def numbers(*shape: int, seed: int) -> Tensor:
    """Rows that differ in mean and spread, so that each half has statistics of its own."""
    rows = torch.linspace(0.3, 2.5, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * rows + rows


def average_over_ranks(gradients: list[Tensor]) -> list[Tensor]:
    """Average as data-parallel training does."""
    return [mean_over_ranks(gradient) for gradient in gradients]


# What both ranks, and this process on its own, compute.


def contrastive() -> Results:
    """Each loss in one tile and in several."""
    found: Results = {}
    default = raysl.nn.contrast.CPU_TILE
    try:
        for tile in TILES:
            raysl.nn.contrast.CPU_TILE = tile
            found[f"nt_xent_{tile}"] = nt_xent()
            found[f"sigmoid_{tile}"] = sigmoid()
    finally:
        raysl.nn.contrast.CPU_TILE = default
    return found


def nt_xent() -> Results:
    z0, z1 = (mine(numbers(8, 5, seed=seed)).requires_grad_() for seed in (0, 1))
    loss = nt_xent_loss(z0, z1, temperature=0.2)
    loss.backward()
    return {"loss": loss.detach(), "gradients": [z0.grad, z1.grad]}


def sigmoid() -> Results:
    z0, z1 = (mine(numbers(8, 5, seed=seed)).requires_grad_() for seed in (0, 1))
    temperature, bias = (torch.tensor(x, requires_grad=True) for x in (0.3, -2.0))
    loss = sigmoid_loss(z0, z1, temperature=temperature, bias=bias)
    loss.backward()
    shared = average_over_ranks([temperature.grad, bias.grad])
    return {"loss": loss.detach(), "gradients": [z0.grad, z1.grad], "shared": shared}


def batch_norm() -> Results:
    torch.manual_seed(0)
    found: Results = {}
    for name, (kind, shape, dtype) in NORMS.items():
        norm = kind(3, dtype=dtype)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm = set_batch_norm_scope(norm, "sync")
        x = mine(numbers(*shape, seed=2).to(dtype)).requires_grad_()
        weights = mine(numbers(*shape, seed=3).to(dtype))
        for _ in range(2):  # the running statistics move twice
            output = norm(x)
        (output * weights).sum().backward()
        found[name] = {
            "output": output.detach(),
            "input_gradient": x.grad,
            "gradients": average_over_ranks([norm.weight.grad, norm.bias.grad]),
            "buffers": [norm.running_mean, norm.running_var, norm.num_batches_tracked],
            "evaluated": norm.eval()(x).detach(),
        }
    return found


def build(name: str) -> Method:
    torch.manual_seed(0)
    kind = load_method(name.split("_", maxsplit=1)[0])
    backbone = build_backbone(BackboneConfig(name="resnet18"), image_size_px=32)
    method = kind(kind.Config(**METHODS[name]), backbone, TRAINING_SET)
    set_batch_norm_scope(method, "sync")
    for network in method.children():
        network.double()  # in float32, rounding turns a few ReLUs, and with them the gradient
    return method


def train_steps(name: str) -> Results:
    """Take steps: the loss of MoCo's second shows its queue, moving average and weights."""
    method = build(name)
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.02)
    found: Results = {"losses": []}
    for step in range(NUM_STEPS[name]):
        views = [
            mine(numbers(RANKS * PER_RANK, 3, 32, 32, seed=10 * step + view).double())
            for view in range(2)
        ]
        progress = Progress(step, 10, 5, seed=1)
        output = model(Batch(views, mine(torch.arange(RANKS * PER_RANK))), progress)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_optimizer_step(progress)
        found["losses"].append(mean_over_ranks(output.loss.detach()))
        if step == 0:
            found["gradients"] = [p.grad.clone() for p in trainable]
    found["buffers"] = dict(method.named_buffers())
    return found


def cached() -> Results:
    """The gradient of a batch in parts of two images, where each rank holds four."""
    method = build("simclr").eval()  # else batch norm would take its statistics from the parts
    views = [mine(numbers(RANKS * PER_RANK, 3, 32, 32, seed=view).double()) for view in range(2)]
    output = backward(
        method,
        Batch(views, mine(torch.arange(RANKS * PER_RANK))),
        Progress(0, 10, 5, seed=1),
        model=method,
        autocast=nullcontext,
        micro_batch_size=2,
    )
    gradients = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    return {"loss": mean_over_ranks(output.loss), "gradients": gradients}


def embedded() -> Results:
    found = {}
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.BatchNorm1d(4))
    for count in EVAL_SIZES:
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        images = EvalImages(
            ArraySource("made up", pixels),
            np.arange(count),
            np.zeros(count, dtype=np.int64),
            size_px=8,
            crop_fraction=1.0,
            num_threads=1,
        )
        found[count] = embed(
            encoder, images, to_input=lambda x: torch.from_numpy(x).permute(0, 3, 1, 2) / 255
        )
    return found


def collectives() -> Results:
    """Rank r holds rows [r, r], [r, r + 1]; its loss weighs all rows by r + 1."""
    rank, _ = rank_and_size()
    rows = torch.tensor([[rank, rank], [rank, rank + 1]], dtype=torch.float32, requires_grad=True)
    gathered = gather_batch(rows)
    (gathered * torch.arange(8.0).view(4, 2) * (rank + 1)).sum().backward()
    value = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
    total = sum_over_ranks(value)
    (total * torch.tensor([2.0, 3.0]) * (rank + 1)).sum().backward()
    given = torch.tensor([float(rank), 4.0], requires_grad=True)
    found = {
        "rank_and_size": rank_and_size(),
        "gathered": gathered.detach(),
        "gathered_gradient": rows.grad,
        "gathered_no_grad": gather_batch_no_grad(rows),
        "gathered_columns": gather_batch_no_grad(torch.full((2, 3), float(rank)).T),
        "sum": total.detach(),
        "sum_gradient": value.grad,
        "mean": mean_over_ranks(given),
        "given": given.detach(),
        "object": broadcast_object({"from": rank, "text": "x" * (rank + 1)}),
    }
    barrier()
    return found


def everything() -> Results:
    """Compute what must not depend on how many processes share the work, and what does."""
    found: Results = {"losses": contrastive(), "batch_norm": batch_norm(), "embedded": embedded()}
    found |= {"cached": cached()}
    if rank_and_size()[1] == RANKS:
        found["collectives"] = collectives()
    return found | {name: train_steps(name) for name in METHODS}


def joined(ranks: list[Results], pick: Callable[[Results], Tensor]) -> Tensor:
    return torch.cat([pick(found) for found in ranks])


def assert_equal_to_scale(found: Tensor, expected: Tensor, *, scale: float = 1e-5) -> None:
    """Equal up to ``scale`` times the largest number expected."""
    limit = scale * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=limit)


class TestCollectives:
    def test_each_process_knows_its_place(self, ranks: list[Results]) -> None:
        assert [found["collectives"]["rank_and_size"] for found in ranks] == [(0, 2), (1, 2)]

    def test_gathered_rows_are_in_the_order_of_ranks_on_every_rank(
        self, ranks: list[Results]
    ) -> None:
        expected = torch.tensor([[0.0, 0], [0, 1], [1, 1], [1, 2]])
        for found in ranks:
            assert torch.equal(found["collectives"]["gathered"], expected)
            assert torch.equal(found["collectives"]["gathered_no_grad"], expected)
            assert not found["collectives"]["gathered_no_grad"].requires_grad

    def test_rows_that_are_not_contiguous_are_gathered_too(self, ranks: list[Results]) -> None:
        expected = torch.tensor([0.0, 0, 0, 1, 1, 1])[:, None].expand(6, 2)
        assert all(torch.equal(f["collectives"]["gathered_columns"], expected) for f in ranks)

    def test_gradient_of_a_row_is_summed_over_the_ranks_that_used_it(
        self, ranks: list[Results]
    ) -> None:
        expected = torch.arange(8.0).view(4, 2) * (1 + 2)
        assert torch.equal(joined(ranks, lambda f: f["collectives"]["gathered_gradient"]), expected)

    def test_sum_and_its_gradient_are_sums_over_ranks(self, ranks: list[Results]) -> None:
        for found in ranks:
            assert found["collectives"]["sum"].tolist() == [1 + 2, 20]
            assert found["collectives"]["sum_gradient"].tolist() == [2 * 3, 3 * 3]

    def test_mean_is_the_same_on_every_rank_and_leaves_what_it_was_given(
        self, ranks: list[Results]
    ) -> None:
        for rank, found in enumerate(ranks):
            assert found["collectives"]["mean"].tolist() == [0.5, 4.0]
            assert found["collectives"]["given"].tolist() == [rank, 4.0]

    def test_an_object_is_that_of_rank_0(self, ranks: list[Results]) -> None:
        assert all(f["collectives"]["object"] == {"from": 0, "text": "x"} for f in ranks)


class TestBatchNorm:
    @pytest.mark.parametrize("kind", NORMS)
    def test_two_ranks_equal_one_big_batch(
        self, ranks: list[Results], alone: Results, kind: str
    ) -> None:
        """Output and input gradient of each row, weight gradients, and running statistics."""
        expected = alone["batch_norm"][kind]
        scale = 1e-13 if kind == "float64" else 1e-5
        for name in ("output", "input_gradient", "evaluated"):
            found = joined(ranks, lambda f, name=name: f["batch_norm"][kind][name])
            assert_equal_to_scale(found, expected[name], scale=scale)
        for found in ranks:
            both = found["batch_norm"][kind]
            # The mean over ranks of a sum over rows: half of the sum over all rows.
            for gradient, total in zip(both["gradients"], expected["gradients"], strict=True):
                assert_equal_to_scale(gradient * RANKS, total, scale=scale)
            for buffer, whole in zip(both["buffers"], expected["buffers"], strict=True):
                torch.testing.assert_close(buffer, whole, rtol=1e-5, atol=1e-6)

    def test_each_rank_on_its_own_would_have_given_something_else(self, alone: Results) -> None:
        x = numbers(8, 3, 5, 5, seed=2)
        halves = torch.cat([nn.BatchNorm2d(3)(half) for half in x.chunk(2)])
        assert (halves - nn.BatchNorm2d(3)(x)).abs().max() > 0.1


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["nt_xent", "sigmoid"])
class TestLoss:
    def test_of_two_ranks_equals_that_of_one_big_batch(
        self, ranks: list[Results], alone: Results, name: str, tile: int
    ) -> None:
        key = f"{name}_{tile}"
        losses = [found["losses"][key]["loss"] for found in ranks]
        assert losses[0] != losses[1]  # each is the mean over the rank's own images
        torch.testing.assert_close(torch.stack(losses).mean(), alone["losses"][key]["loss"])
        for view in range(2):
            gradient = joined(ranks, lambda f, view=view: f["losses"][key]["gradients"][view])
            expected = alone["losses"][key]["gradients"][view]
            assert_equal_to_scale(gradient / RANKS, expected)  # the mean of the ranks' losses


@pytest.mark.parametrize("tile", TILES)
def test_gradients_of_a_learned_temperature_and_bias_are_those_of_one_big_batch(
    ranks: list[Results], alone: Results, tile: int
) -> None:
    expected = alone["losses"][f"sigmoid_{tile}"]["shared"]
    for found in ranks:
        shared = found["losses"][f"sigmoid_{tile}"]["shared"]
        for gradient, whole in zip(shared, expected, strict=True):
            assert_equal_to_scale(gradient, whole)


@pytest.mark.parametrize("name", METHODS)
class TestMethod:
    def test_two_ranks_equal_one_big_batch_in_loss(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        for found in ranks:
            for loss, expected in zip(found[name]["losses"], alone[name]["losses"], strict=True):
                torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)

    def test_two_ranks_equal_one_big_batch_in_every_gradient(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        expected = alone[name]["gradients"]
        scale = max(float(gradient.abs().max()) for gradient in expected)
        for found in ranks:
            for gradient, whole in zip(found[name]["gradients"], expected, strict=True):
                torch.testing.assert_close(gradient, whole, rtol=0.0, atol=1e-5 * scale)

    def test_both_ranks_end_with_the_same_gradients_and_buffers(
        self, ranks: list[Results], name: str
    ) -> None:
        assert all(map(torch.equal, *(found[name]["gradients"] for found in ranks)))
        first, second = (found[name]["buffers"] for found in ranks)
        assert all(torch.equal(value, second[key]) for key, value in first.items())


class TestQueue:
    def test_of_simclr_holds_the_same_keys_at_the_same_places(
        self, ranks: list[Results], alone: Results
    ) -> None:
        expected = alone["simclr_memory"]["buffers"]
        for found in ranks:
            buffers = found["simclr_memory"]["buffers"]
            assert torch.equal(buffers["memory.put_at_step"], expected["memory.put_at_step"])
            assert int(buffers["memory.put_at_step"].max()) == 1
            torch.testing.assert_close(
                buffers["memory.keys"], expected["memory.keys"], rtol=1e-4, atol=1e-4
            )

    def test_of_two_ranks_equals_that_of_one(self, ranks: list[Results], alone: Results) -> None:
        expected = alone["moco"]["buffers"]
        for found in ranks:
            buffers = found["moco"]["buffers"]
            assert int(buffers["queue.place"]) == int(expected["queue.place"]) == 16
            torch.testing.assert_close(
                buffers["queue.keys"], expected["queue.keys"], rtol=1e-4, atol=1e-4
            )

    def test_of_a_symmetric_loss_holds_the_same_keys_at_the_same_places(
        self, ranks: list[Results], alone: Results
    ) -> None:
        """View by view: with fewer places than keys of two steps, the same ones are kept."""
        found = ranks[0]["moco_symmetric"]["buffers"]["queue.keys"][:16]
        expected = alone["moco_symmetric"]["buffers"]["queue.keys"][:16]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class TestEmbed:
    @pytest.mark.parametrize("count", EVAL_SIZES)
    def test_two_ranks_share_the_images_and_give_the_features_of_one(
        self, ranks: list[Results], alone: Results, count: int
    ) -> None:
        """Also when the images do not divide over the ranks, or are fewer."""
        for found in ranks:
            assert found["embedded"][count].shape == (count, 4)
            torch.testing.assert_close(found["embedded"][count], alone["embedded"][count])


class TestCachedGradient:
    def test_of_two_ranks_in_parts_is_that_of_one_in_parts(
        self, ranks: list[Results], alone: Results
    ) -> None:
        """And that of one in parts is the plain one: tests/train/test_gradient.py."""
        expected = alone["cached"]
        for found in (rank["cached"] for rank in ranks):
            torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
            for gradient, exact in zip(found["gradients"], expected["gradients"], strict=True):
                torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-7)
