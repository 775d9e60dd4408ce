"""Work in threads: in order, bounded, and errors where they belong."""

import time

import pytest

from raysl.pack.threads import map_in_threads


@pytest.mark.parametrize("num_threads", [1, 3])
class TestMapInThreads:
    def test_keeps_the_order_whatever_is_slow(self, num_threads: int) -> None:
        def late(number: int) -> int:
            time.sleep(0.01 * (number % 3 == 0))
            return 2 * number

        found = list(map_in_threads(late, range(20), num_threads=num_threads))
        assert found == list(range(0, 40, 2))

    def test_takes_arguments_only_a_little_ahead(self, num_threads: int) -> None:
        taken = []

        def numbers() -> "object":
            for number in range(100):
                taken.append(number)
                yield number

        results = map_in_threads(abs, numbers(), num_threads=num_threads)  # type: ignore[arg-type]
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert len(taken) <= 5 + 2 * num_threads

    def test_raises_what_the_function_raised_at_its_place(self, num_threads: int) -> None:
        results = map_in_threads(lambda n: 1 // (3 - n), range(9), num_threads=num_threads)
        assert [next(results) for _ in range(3)] == [0, 0, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)
