"""``health.check_ranks`` on two gloo processes: nothing while they are equal, else the names.

The training is the loop's own, on half of the images each, with batch norm of the worker.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import RANKS, Results, mine

from raysl.errors import RanksDifferError
from raysl.methods.base import Batch, TrainingSet
from raysl.methods.moco import MoCo, MoCoConfig
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import rank_and_size
from raysl.optim.build import Rates, ScheduledOptimizer
from raysl.train.health import HealthCheck, HealthConfig
from raysl.train.loop import Hooks, Schedule, Trainer
from raysl.train.rank_check import compare_ranks, state_of

pytestmark = pytest.mark.distributed

PER_RANK = 4
STEPS = 6

Change = Callable[[MoCo, torch.optim.Optimizer], None]


def method_of() -> MoCo:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6), nn.BatchNorm1d(6), nn.ReLU())
    data = TrainingSet(64, RANKS * PER_RANK, (4, 4))
    config = MoCoConfig(queue_length=64, projection_dim=5, ema_momentum=0.9)
    return MoCo(config, Backbone(net, embed_dim=6), data)


def batches() -> Iterator[dict[str, Any]]:
    for step in range(STEPS):
        yield {"index": np.arange(PER_RANK), "step": np.full(PER_RANK, step)}


def to_batch(values: Any) -> Batch:
    generator = torch.Generator().manual_seed(int(values["step"][0]))
    rows = torch.linspace(0.3, 2.5, RANKS * PER_RANK).view(-1, 1, 1, 1)
    shape = (RANKS * PER_RANK, 3, 4, 4)
    views = [mine(torch.randn(shape, generator=generator) * rows + rows) for _ in range(2)]
    return Batch(views, mine(torch.arange(RANKS * PER_RANK)))


def train(change: Change | None, *, at_step: int = 4, check_ranks: int | None = 2) -> str:
    """Train six logging steps, with a change on rank 1 after one of them; return the error."""
    method = method_of()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.01)
    scheduled = ScheduledOptimizer(optimizer, lambda step: Rates(0.01, 0.01, 0.0))
    trainer = Trainer(
        method,
        [scheduled],
        model=DistributedDataParallel(method, broadcast_buffers=False),
        schedule=Schedule(STEPS, 6, 1, 100, None, seed=1),
        to_batch=to_batch,
        precision="fp32",
        max_grad_norm=None,
        health=HealthCheck(HealthConfig(min_feature_std=0.0)),
        check_ranks=check_ranks,
    )

    def log(_: Any, step: int) -> None:
        if change is not None and step == at_step and rank_and_size()[0] == 1:
            change(method, optimizer)

    hooks = Hooks(log, lambda step: None, lambda step: {}, lambda rows, step: 0.0)
    try:
        trainer.run(batches(), start_step=0, rank=rank_and_size()[0], hooks=hooks)
    except RanksDifferError as error:
        return str(error)
    return ""


def next_float(tensor: Tensor) -> None:
    """Change one element by the smallest amount there is."""
    with torch.no_grad():
        tensor.view(-1)[1] = torch.nextafter(tensor.view(-1)[1], torch.tensor(torch.inf))


def teacher(method: MoCo, _: torch.optim.Optimizer) -> None:
    next_float(next(p for p in method.parameters() if not p.requires_grad))


def queue(method: MoCo, _: torch.optim.Optimizer) -> None:
    next_float(method.queue.keys)


def momentum(method: MoCo, optimizer: torch.optim.Optimizer) -> None:
    next_float(next(iter(optimizer.state.values()))["exp_avg"])


def statistics(method: MoCo, _: torch.optim.Optimizer) -> None:
    next_float(next(m for m in method.modules() if isinstance(m, nn.BatchNorm1d)).running_mean)


CHANGES: dict[str, Change] = {"teacher": teacher, "queue": queue, "momentum": momentum}


def other_tensors() -> str:
    rank, _ = rank_and_size()
    state = [("weight", torch.zeros(2)), ("bias", torch.zeros(2 + rank))]
    try:
        compare_ranks(state, step=7)
    except RanksDifferError as error:
        return str(error)
    return ""


def many() -> str:
    """Seven tensors, of which all but the first differ."""
    rank, _ = rank_and_size()
    state = [(f"t{n}", torch.full((3,), float(rank * n))) for n in range(7)]
    try:
        compare_ranks(state, step=7)
    except RanksDifferError as error:
        return str(error)
    return ""


def everything() -> Results:
    if rank_and_size()[1] == 1:
        return {}
    found = {name: train(change) for name, change in CHANGES.items()}
    method = method_of()
    names = [name for name, _ in state_of(method, [])]
    return found | {
        "equal": train(None),
        "statistics": train(statistics),
        "unchecked": train(queue, check_ranks=None),
        "before the check": train(queue, at_step=2),
        "other": other_tensors(),
        "many": many(),
        "names": names,
    }


def test_a_training_whose_ranks_are_equal_goes_through(ranks: list[Results]) -> None:
    assert [found["equal"] for found in ranks] == ["", ""]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("teacher", "key_encoder.0.net.1.weight: each rank has another value"),
        ("queue", "queue.keys: each rank has another value"),
        ("momentum", "optimizer 0, exp_avg of "),
    ],
)
def test_one_bit_on_one_rank_ends_it_on_both_with_the_name(
    ranks: list[Results], what: str, named: str
) -> None:
    first, second = (found[what] for found in ranks)
    assert first == second
    assert named in first
    assert first.startswith("after step 5, the 2 train workers hold different values")
    assert "health.check_ranks=null" in first


def test_a_change_is_found_at_the_next_check(ranks: list[Results]) -> None:
    """Steps 1, 3 and 5 are checked; a queue that was changed after step 2 is found at 3."""
    assert ranks[0]["before the check"].startswith("after step 3, ")


def test_statistics_that_each_rank_has_its_own_of_are_no_difference(ranks: list[Results]) -> None:
    assert ranks[0]["statistics"] == ""
    assert not [name for name in ranks[0]["names"] if "running" in name]
    assert [name for name in ranks[0]["names"] if "num_batches_tracked" in name]


def test_null_checks_nothing(ranks: list[Results]) -> None:
    assert ranks[0]["unchecked"] == ""


def test_tensors_of_other_shapes_are_named_with_their_ranks(ranks: list[Results]) -> None:
    assert ranks[0]["other"] == ranks[1]["other"]
    assert "bias (2,) torch.float32: only on rank 0" in ranks[0]["other"]
    assert "bias (3,) torch.float32: only on rank 1" in ranks[0]["other"]


def test_the_first_five_are_named_and_the_others_counted(ranks: list[Results]) -> None:
    text = ranks[0]["many"]
    assert "(6 of 7 tensors)" in text
    assert "\n  t5: " in text
    assert "\n  t6: " not in text
    assert "\n  and 1 more" in text
