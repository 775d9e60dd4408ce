"""Raise the precision of losses under autocast, and measure the cost of bfloat16 on a CPU."""

import time

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a tensor to float32; float64 is unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def bf16_slowdown_on_cpu() -> float:
    """Measure the time of a bfloat16 matrix product on this CPU over that of a float32 one.

    A CPU without bfloat16 instructions (AVX-512 BF16, AMX) emulates them; ratios of 10 to 250 were
    measured. Takes the minimum of three products of 128 x 128 on one thread: milliseconds, and
    robust against other load.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _matmul_s(torch.bfloat16) / _matmul_s(torch.float32)
    finally:
        torch.set_num_threads(num_threads)


def _matmul_s(dtype: torch.dtype) -> float:
    matrix = torch.ones(128, 128, dtype=dtype)
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        durations.append(time.perf_counter() - start)
    return min(durations)
