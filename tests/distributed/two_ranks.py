"""What two gloo processes run for the tests of this folder.

A module, as a process that is started anew finds functions by their module's name, which is the
same for every ``conftest.py``.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from raysl.nn.collectives import rank_and_size

RANKS = 2
TIMEOUT_S = 180

Results = dict[str, Any]


def mine(rows: Tensor) -> Tensor:
    """This rank's part of a batch; all of it in a process on its own."""
    rank, size = rank_and_size()
    return rows.chunk(size)[rank].clone()


def on_two_ranks(compute: Callable[[], Results], folder: Path) -> list[Results]:
    """Return what ``compute``, a function of a module, gives on each rank."""
    context = mp.start_processes(
        _run_rank, args=(compute, str(folder)), nprocs=RANKS, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1.0):  # raises what a rank raised
            assert time.monotonic() < deadline, f"two ranks took more than {TIMEOUT_S} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


def _run_rank(rank: int, compute: Callable[[], Results], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )
    torch.save(compute(), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()
