"""Numerical precision: float32 where autocast has left less, and what bfloat16 costs here."""

import time

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a tensor to float32; float64 is unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def bf16_slowdown_on_cpu() -> float:
    """Measure how many times as long as float32 a bfloat16 matrix product takes on this CPU.

    A CPU without bfloat16 instructions (AVX-512 BF16, AMX) emulates them: 10 to 250 times as long
    were seen. The shortest of three products of 128 x 128 on one thread counts, which takes
    milliseconds and stays right while other programs run.
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
