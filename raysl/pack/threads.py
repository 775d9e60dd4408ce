"""Run work in threads of this process, in order and with a bounded queue."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CALLS_PER_THREAD = 2  # submitted calls: one runs, one waits


def map_in_threads(
    function: Callable[[T], R], arguments: Iterable[T], *, num_threads: int
) -> Iterator[R]:
    """Yield ``function(argument)`` for each argument, in the order of the arguments.

    Args:
        function: Called in several threads; it should release the GIL, as OpenCV and disks do.
        arguments: Consumed only as results are consumed, so that memory stays bounded.
        num_threads: Number of threads, > 0; with 1, each call runs in this thread when its result
            is requested.

    Raises:
        Exception: The error of a call, in place of its result.
    """
    if num_threads == 1:
        yield from map(function, arguments)
        return
    upcoming = iter(arguments)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="raysl") as pool:
        try:
            for argument in islice(upcoming, _CALLS_PER_THREAD * num_threads):
                waiting.append(pool.submit(function, argument))
            while waiting:
                result = waiting.popleft().result()
                for argument in islice(upcoming, 1):
                    waiting.append(pool.submit(function, argument))
                yield result
        finally:
            for future in waiting:
                future.cancel()
