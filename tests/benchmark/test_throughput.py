"""Images a second are counted over whole rounds, after the first one."""

import itertools
import time
from collections.abc import Iterator

import pytest

from raysl.benchmark.throughput import Throughput, measure_batches
from raysl.errors import DataError


class Clock:
    """Stands in for time.perf_counter: batches take the time that they say."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def batches(self, times: list[float]) -> Iterator[bytes]:
        for seconds in times:
            self.now += seconds
            yield bytes(6)


def measured(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, times: list[float], **how: float
) -> Throughput:
    monkeypatch.setattr(time, "perf_counter", clock)
    return measure_batches(
        lambda: clock.batches(times),
        batch_size=3,
        size_of=len,
        **how,  # type: ignore[arg-type]
    )


class TestMeasureBatches:
    def test_the_start_is_the_first_batch_and_does_not_count(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = measured(Clock(), monkeypatch, [9.0, *[0.5] * 10], round_batches=1, count=4)
        assert seen.first_batch_s == 9
        assert seen.images_per_s == 6
        assert seen.wait_s == [0.5] * 4
        assert seen.bytes_per_image == 2

    def test_batches_that_come_in_bursts_are_counted_by_the_round(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Four workers that begin together deliver four batches every second: 12 images/s."""
        times = [1.0, 0.0, 0.0, 0.0] * 20
        for seconds in (0.5, 1.5, 2.0):
            seen = measured(Clock(), monkeypatch, times, round_batches=4, seconds=seconds)
            assert seen.images_per_s == 12

    def test_a_count_takes_the_rest_so_that_the_stream_ends_by_itself(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock()
        measured(clock, monkeypatch, [1.0] * 10, round_batches=1, count=2)
        assert clock.now == 10

    def test_a_stream_without_end_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock()
        monkeypatch.setattr(time, "perf_counter", clock)
        endless = clock.batches(itertools.repeat(1.0))  # type: ignore[arg-type]
        seen = measure_batches(
            lambda: endless, batch_size=1, round_batches=1, size_of=len, seconds=5
        )
        assert len(seen.wait_s) == 5

    @pytest.mark.parametrize(("count", "word"), [(0, "within"), (2, "within"), (3, "after")])
    def test_a_stream_that_ends_too_early_is_an_error(self, count: int, word: str) -> None:
        clock = Clock()
        with pytest.raises(DataError, match=f"ended {word} its first round"):
            measure_batches(
                lambda: clock.batches([1.0] * count),
                batch_size=1,
                round_batches=3,
                size_of=len,
                seconds=1,
            )
