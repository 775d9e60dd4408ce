"""What two gloo processes, or more, run for the tests of this folder.

A module, as a process that is started anew finds functions by their module's name, which is the
same for every ``conftest.py``.
"""

import multiprocessing
import multiprocessing.connection
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raysl.nn.collectives import rank_and_size

RANKS = 2
TIMEOUT_S = 180

Results = dict[str, Any]
Compute = Callable[[], Results]


def mine(rows: Tensor) -> Tensor:
    """This rank's part of a batch; all of it in a process on its own."""
    rank, size = rank_and_size()
    return rows.chunk(size)[rank].clone()


class Ranks:
    """Processes that compute one function after the other, each on its rank.

    They end with the first function that fails on a rank; the next one gets new processes.
    """

    def __init__(self, folder: Path, count: int = RANKS) -> None:
        self._folder = folder
        self._count = count
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._lines: list[Connection] = []
        self._number = 0

    def __call__(self, compute: Compute) -> list[Results]:
        """Return what ``compute``, a function of a module, gives on each rank."""
        if not self._processes:
            self._start()
        self._number += 1
        files = [self._folder / f"{self._number}-of-rank-{rank}.pt" for rank in range(self._count)]
        try:
            for line, file in zip(self._lines, files, strict=True):
                line.send((compute, str(file)))
            self._wait_for_answers()
        except BaseException:
            self.end()
            raise
        return [torch.load(file) for file in files]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = self._folder / f"rendezvous-{self._number}"
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self._count, str(rendezvous), theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of the process is the end of the line
            self._processes.append(process)
            self._lines.append(ours)

    def _wait_for_answers(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        waiting = list(self._lines)
        while waiting:
            ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
            assert ready, f"the ranks took more than {TIMEOUT_S} s"
            for line in ready:
                assert isinstance(line, Connection)
                failed = line.recv()  # raises EOFError where the process has ended
                if failed:
                    raise RuntimeError(f"rank {self._lines.index(line)} failed:\n{failed}")
                waiting.remove(line)

    def end(self) -> None:
        for process, line in zip(self._processes, self._lines, strict=True):
            process.kill()
            process.join()
            line.close()
        self._processes, self._lines = [], []


def _serve(rank: int, count: int, rendezvous: str, line: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )
    with suppress(EOFError):  # the tests are over
        while True:
            compute, file = line.recv()
            try:
                torch.save(compute(), file)
                line.send(None)
            except Exception:
                line.send(traceback.format_exc())
