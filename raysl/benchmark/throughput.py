"""Measure the speed of an iterator of batches."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from raysl.errors import DataError

B = TypeVar("B")


class Throughput(NamedTuple):
    """The speed of a stream, measured by a consumer that drops its batches."""

    images_per_s: float
    """Images per second after the first round."""
    first_batch_s: float
    """Time from opening the stream to its first batch."""
    wait_s: list[float]
    """Waiting time for each counted batch."""
    seconds: float
    """Duration of the measurement, after the first round."""
    bytes_per_image: float


def measure_batches(
    open_batches: Callable[[], Iterator[B]],
    *,
    batch_size: int,
    round_batches: int,
    size_of: Callable[[B], int],
    seconds: float | None = None,
    count: int | None = None,
) -> Throughput:
    """Measure the speed at which a stream delivers batches, which are dropped.

    Workers begin together, so their first results arrive together: time that started at the first
    batch would count results that were made before. So it starts after the first round, in which
    every worker delivers once, and whole rounds are counted.

    Args:
        open_batches: Opens the stream; the first batch is timed from this call on.
        batch_size: Images per batch.
        round_batches: Number of batches in which each worker delivers once, > 0.
        size_of: Returns the bytes of a batch.
        seconds: Measure at least this long, up to the end of a round.
        count: Measure at most this many batches after the first round. The rest of the stream is
            then taken without being counted, so that no worker is stopped in the middle.

    Raises:
        DataError: If the stream ends before a batch could be counted.
    """
    began = time.perf_counter()
    batches = open_batches()
    batch = next(batches, None)
    first_batch_s = time.perf_counter() - began
    for _ in range(round_batches - 1):
        batch = next(batches, None)
    if batch is None:
        raise DataError("the stream ended within its first round: nothing could be measured")
    num_bytes = size_of(batch)
    wait_s: list[float] = []
    began = previous = time.perf_counter()
    for _ in batches:
        now = time.perf_counter()
        wait_s.append(now - previous)
        if count is not None and len(wait_s) >= count:
            break
        at_end_of_round = len(wait_s) % round_batches == 0
        if seconds is not None and at_end_of_round and now - began >= seconds:
            break
        previous = time.perf_counter()
    elapsed = time.perf_counter() - began
    if not wait_s:
        raise DataError("the stream ended after its first round: nothing could be measured")
    if count is not None:
        deque(batches, maxlen=0)
    images_per_s = len(wait_s) * batch_size / elapsed
    return Throughput(images_per_s, first_batch_s, wait_s, elapsed, num_bytes / batch_size)
