import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from raysl.sources.cache import ByteCache


class TestByteCache:
    def test_reads_a_value_once_while_it_is_held(self) -> None:
        cache: ByteCache[str] = ByteCache(10)
        asked = []

        def read() -> tuple[str, int]:
            asked.append(1)
            return "value", 5

        assert [cache.get("a", read) for _ in range(3)] == ["value"] * 3
        assert len(asked) == 1

    def test_forgets_the_longest_unused_beyond_its_budget(self) -> None:
        cache: ByteCache[str] = ByteCache(10)
        for key in ("a", "b", "a", "c"):
            cache.get(key, lambda: ("", 5))
        assert ["a" in cache, "b" in cache, "c" in cache] == [True, False, True]

    def test_holds_one_value_that_is_larger_than_its_budget(self) -> None:
        cache: ByteCache[str] = ByteCache(10)
        cache.get("a", lambda: ("", 5))
        cache.get("b", lambda: ("", 50))
        assert ["a" in cache, "b" in cache] == [False, True]
        cache.get("c", lambda: ("", 5))
        assert ["b" in cache, "c" in cache] == [False, True]

    def test_threads_wait_for_one_reading_of_the_same_and_not_for_others(self) -> None:
        cache: ByteCache[int] = ByteCache(100)
        begun, go_on = threading.Event(), threading.Event()
        asked = []

        def slow() -> tuple[int, int]:
            asked.append(1)
            begun.set()
            assert go_on.wait(20)
            return 7, 1

        with ThreadPoolExecutor(3) as pool:
            same = [pool.submit(cache.get, "a", slow) for _ in range(2)]
            assert begun.wait(20)
            assert cache.get("b", lambda: (8, 1)) == 8
            go_on.set()
            assert [future.result(20) for future in same] == [7, 7]
        assert len(asked) == 1

    def test_an_error_reaches_all_that_wait_and_is_not_held(self) -> None:
        cache: ByteCache[int] = ByteCache(100)
        begun, go_on = threading.Event(), threading.Event()

        def fail() -> tuple[int, int]:
            begun.set()
            assert go_on.wait(20)
            raise OSError("gone")

        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(cache.get, "a", fail)
            assert begun.wait(20)
            second = pool.submit(cache.get, "a", fail)
            go_on.set()
            for future in (first, second):
                with pytest.raises(OSError, match="gone"):
                    future.result(20)
        assert cache.get("a", lambda: (3, 1)) == 3

    def test_a_pickled_one_is_empty_and_works(self) -> None:
        cache: ByteCache[int] = ByteCache(10)
        cache.get("a", lambda: (1, 5))
        copy = pickle.loads(pickle.dumps(cache))
        assert "a" not in copy
        assert copy.get("a", lambda: (2, 5)) == 2
        assert copy.budget_bytes == 10
