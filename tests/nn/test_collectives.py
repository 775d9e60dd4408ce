"""One process without a process group; tests/distributed has the same with two."""

import torch

from raysl.nn.collectives import (
    barrier,
    broadcast_object,
    gather_batch,
    gather_batch_no_grad,
    mean_over_ranks,
    rank_and_size,
    sum_over_ranks,
)


def test_a_process_on_its_own_is_rank_zero_of_one() -> None:
    assert rank_and_size() == (0, 1)


def test_alone_every_collective_returns_what_it_was_given() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    for collective in (gather_batch, gather_batch_no_grad, sum_over_ranks, mean_over_ranks):
        assert collective(rows) is rows
    value = {"lr": 0.1}
    assert broadcast_object(value) is value
    barrier()
