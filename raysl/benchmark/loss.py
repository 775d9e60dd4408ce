"""Measure time and memory of NT-Xent, tiled and with the full matrix, over the batch size.

Each measurement runs in a separate process (``python -m raysl.benchmark.loss``), so that it does
not count the memory of another. One that would not fit into the free memory is not run.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.benchmark.own_process import run_in_own_process
from raysl.errors import DataError
from raysl.methods.simclr import nt_xent_loss
from raysl.train.memory import peak_bytes

TEMPERATURE = 0.1
PLAIN_MATRICES = 3
"""Number of 2N x 2N float32 matrices in memory at the peak of the plain form: the log-softmax, its
gradient and the gradient of the logits."""
_FREE_SHARE = 0.8  # largest share of the free memory for a measurement
_MAX_STEPS, _MAX_S = 20, 2.0  # limits of one measurement
_TIMEOUT_S = 1800.0
_WARM_UP_BATCH = 64


def plain_nt_xent(z0: Tensor, z1: Tensor, *, temperature: float) -> Tensor:
    """Return NT-Xent by its definition, the cross entropy of a matrix of all pairs."""
    n = len(z0)
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = z @ z.T / temperature  # (2N, 2N)
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


FORMS: dict[str, Callable[..., Tensor]] = {"plain": plain_nt_xent, "tiled": nt_xent_loss}


class LossCost(NamedTuple):
    """Time and memory of the forward and backward pass of a loss; None if it was not run."""

    form: str
    batch_size: int
    dim: int
    ms: float | None
    """Median milliseconds of the steps in one process."""
    peak_bytes: int | None
    """Peak memory, minus that of the process before the first step."""
    problem: str | None = None
    """Why it was not run; None if it was."""


def device_name() -> str:
    """Return the device on which losses are measured: cuda if there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def needed_bytes(form: str, batch_size: int, dim: int) -> int:
    """Estimate the memory of the forward and backward pass."""
    rows = 2 * batch_size
    embeddings = 8 * 4 * rows * dim
    return embeddings + (PLAIN_MATRICES * 4 * rows**2 if form == "plain" else 256 << 20)


def free_bytes() -> int:
    """Return the free memory of the device in bytes."""
    if device_name() == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def measure(form: str, batch_size: int, dim: int) -> LossCost:
    """Measure a loss in this process."""
    device = device_name()
    generator = torch.Generator().manual_seed(0)

    def embeddings(n: int) -> list[Tensor]:
        views = (torch.randn(n, dim, generator=generator) for _ in range(2))
        return [z.to(device).requires_grad_() for z in views]

    _step(form, embeddings(min(_WARM_UP_BATCH, batch_size)))  # initialises libraries
    inputs = embeddings(batch_size)
    peak = _PeakMemory(device)
    times: list[float] = []
    while not times or (len(times) < _MAX_STEPS and sum(times) < _MAX_S):
        times.append(_step(form, inputs))
    peak_bytes = peak.above_start()
    later = times[1:] or times  # the first step also allocates memory
    return LossCost(form, batch_size, dim, 1000 * statistics.median(later), peak_bytes)


def _step(form: str, inputs: list[Tensor]) -> float:
    """Run a forward and a backward pass and return its seconds."""
    for z in inputs:
        z.grad = None
    _wait(inputs[0])
    began = time.perf_counter()
    FORMS[form](*inputs, temperature=TEMPERATURE).backward()
    _wait(inputs[0])
    return time.perf_counter() - began


def _wait(z: Tensor) -> None:
    if z.device.type == "cuda":
        torch.cuda.synchronize()


class _PeakMemory:
    """Measures the peak memory since its creation, minus the memory in use at its creation."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):  # on Linux, 5 resets the peak to the current memory
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.start = peak_bytes(self.device)

    def above_start(self) -> int:
        return peak_bytes(self.device) - self.start


def measure_in_own_process(form: str, batch_size: int, dim: int) -> dict[str, Any]:
    """Measure a loss in a separate process, if it fits into the free memory."""
    needed, free = needed_bytes(form, batch_size, dim), free_bytes()
    if needed > _FREE_SHARE * free:
        problem = f"not run: needs {needed / 2**30:,.0f} GiB, {free / 2**30:,.0f} GiB are free"
        return _failed(form, batch_size, dim, problem)
    words = (form, batch_size, dim)
    try:
        return run_in_own_process("raysl.benchmark.loss", *words, timeout_s=_TIMEOUT_S)
    except DataError as error:
        return _failed(form, batch_size, dim, str(error))


def _failed(form: str, batch_size: int, dim: int, problem: str) -> dict[str, Any]:
    return LossCost(form, batch_size, dim, None, None, problem)._asdict()


def main() -> None:
    """Measure the loss that the arguments name; print one line of JSON."""
    form, batch_size, dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.stdout.write(json.dumps(measure(form, batch_size, dim)._asdict()) + "\n")


if __name__ == "__main__":
    main()
