"""Cache recently read values up to a size in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteCache(Generic[T]):
    """A thread-safe cache that evicts the least recently used value.

    Threads that request the same value wait for a single read; others are not blocked. It holds
    ``budget_bytes``, or one value if that is larger, in addition to values being read. A pickled
    cache is empty.

    Args:
        budget_bytes: Total size of the cached values.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._held: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._held_bytes = 0
        self._reading: dict[Hashable, Future[T]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ByteCache[T]"], tuple[int]]:
        return type(self), (self.budget_bytes,)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._held

    def get(self, key: Hashable, read: Callable[[], tuple[T, int]]) -> T:
        """Return the value of a key, reading it if it is not cached.

        Args:
            key: The value's key.
            read: Returns the value and its size in bytes; its exception reaches all waiting
                threads.
        """
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            future = self._reading.get(key)
            mine = future is None
            if future is None:
                future = self._reading[key] = Future()
        if not mine:
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
            self._held[key] = value, size
            self._held_bytes += size
            while self._held_bytes > self.budget_bytes and len(self._held) > 1:
                self._held_bytes -= self._held.popitem(last=False)[1][1]
        future.set_result(value)
        return value
