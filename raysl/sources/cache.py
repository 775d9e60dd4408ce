"""Cache recently read values up to a size in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteCache(Generic[T]):
    """A thread-safe cache that evicts the least recently used value.

    Threads that request the same value wait for one read; other threads are not blocked. The cache
    holds up to ``budget_bytes``, or one larger value; values being read are not counted. A pickled
    cache is empty.

    Args:
        budget_bytes: Largest total size of the cached values.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._cached: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._cached_bytes = 0
        self._reading: dict[Hashable, Future[T]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ByteCache[T]"], tuple[int]]:
        return type(self), (self.budget_bytes,)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._cached

    def get(self, key: Hashable, read: Callable[[], tuple[T, int]]) -> T:
        """Return the value of a key, reading it if it is not cached.

        Args:
            key: Key of the value.
            read: Returns the value and its size in bytes; all waiting threads raise its exception.
        """
        with self._lock:
            if key in self._cached:
                self._cached.move_to_end(key)
                return self._cached[key][0]
            future = self._reading.get(key)
            is_reader = future is None
            if future is None:
                future = self._reading[key] = Future()
        if not is_reader:
            return future.result()
        try:
            value, size = read()
        except BaseException as error:
            with self._lock:
                del self._reading[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._reading[key]
            self._cached[key] = value, size
            self._cached_bytes += size
            while self._cached_bytes > self.budget_bytes and len(self._cached) > 1:
                self._cached_bytes -= self._cached.popitem(last=False)[1][1]
        future.set_result(value)
        return value
