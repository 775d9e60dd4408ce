"""The function's time is divided rightly, and the figures mean what they say."""

import time

import numpy as np
import pytest

from raysl.augment.crop import Image
from raysl.augment.pipeline import View
from raysl.benchmark import view_function as benchmark_function
from raysl.benchmark.view_function import (
    cost_of,
    default_batch_size,
    time_decode,
    time_function,
    time_whole_items,
)
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.sources.source import ArraySource


class Clock:
    """Stands in for time.perf_counter; things take the time that they say."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), dtype=np.uint8)


def plan() -> Plan:
    return Plan([20], seed=0, global_batch_size=8, item_size=4, num_steps=5)


MAKING = BlockSpec((View(size_px=8),))


class TestTimeFunction:
    def test_reading_cropping_and_operations_are_told_apart(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[bool] = []

        class Slow(ArraySource):
            """Reading takes a second an image."""

            def read(self, indices: object) -> list[bytes | Image]:
                clock.now += len(indices)  # type: ignore[arg-type]
                return super().read(indices)  # type: ignore[arg-type]

        class Maker:
            """Takes 3 seconds an item, and 13 with operations."""

            def __init__(self, source: ArraySource, plan: Plan, spec: BlockSpec) -> None:
                self.source, self.has_ops = source, bool(spec.views[0].ops)

            def __call__(self, position: int) -> None:
                made.append(self.has_ops)
                self.source.read(range(4))
                clock.now += 13 if self.has_ops else 3

        monkeypatch.setattr(benchmark_function, "ItemMaker", Maker)
        view = View.model_validate({"size_px": 8, "ops": ({"op": "flip"},)})
        slow = Slow("slow", pixels())
        found = time_function(slow, plan(), BlockSpec((view,)), seconds=100, start=0)
        assert found.images_per_s == pytest.approx(4 / 17)
        assert found.read_share == pytest.approx(4 / 17)
        assert found.decode_share == pytest.approx(3 / 17)
        assert found.augment_share == pytest.approx(10 / 17)
        assert found.source_bytes_per_image == 24 * 24 * 3
        assert made[:3] == [True, True, False]  # the first is not counted

    def test_measures_the_data_workers_function_and_goes_round_a_short_plan(self) -> None:
        found = time_function(
            ArraySource("fast", pixels()), plan(), MAKING, seconds=0.05, start=10**6
        )
        assert found.images_per_s > 0
        shares = found.read_share, found.decode_share, found.augment_share
        assert sum(shares) == pytest.approx(1)


class TestTimeDecode:
    def test_pixels_need_none(self) -> None:
        assert time_decode(ArraySource("fast", pixels()), seconds=0.01) is None

    def test_bad_images_are_passed_over(self) -> None:
        class Broken(ArraySource):
            def read(self, indices: object) -> list[bytes | Image]:
                return [b"no image"] * len(indices)  # type: ignore[arg-type]

        assert time_decode(Broken("broken", pixels()), seconds=0.01) == 0


def test_whole_items_are_timed_after_the_first(clock: Clock) -> None:
    calls: list[int] = []

    class Maker:
        plan = plan()

        def __call__(self, position: int) -> None:
            clock.now += 2 if calls else 50
            calls.append(position)

    rate = time_whole_items(Maker(), seconds=10, start=8)  # type: ignore[arg-type]
    assert rate == 4 / 2
    assert calls == [8, 9, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("wanted", "images", "consumers", "batch"),
    [
        (4096, 10**6, 1, 256),
        (192, 10**6, 1, 192),
        (4096, 750, 1, 256),
        (4096, 300, 1, 128),
        (4096, 300, 3, 32),
        (4096, 3, 1, 1),
        (4096, 1, 1, 1),
    ],
)
def test_the_batch_fits_into_half_of_the_source(
    wanted: int, images: int, consumers: int, batch: int
) -> None:
    found = default_batch_size(wanted, num_images=images, num_consumers=consumers)
    assert found == batch


class TestCost:
    def cost(self, rate: float, **other: float) -> benchmark_function.Cost:
        shares = {"read": 0.1, "decode": 0.6, "augment": 0.3}
        return cost_of(
            cores=2,
            ray_images_per_s=rate,
            busy_images_per_s_per_core=100,
            shares=shares,
            wait_share=other.get("wait_share", 1.0),
        )

    def test_parts_add_up_to_what_an_image_costs_through_ray(self) -> None:
        cost = self.cost(160)
        assert sum(cost.stages.values()) == pytest.approx(1000 * 2 / 160)
        assert cost.stages["transport"] == pytest.approx(2.5)
        assert cost.binding == "decode"

    def test_the_largest_part_binds(self) -> None:
        assert self.cost(80).binding == "transport"

    def test_a_consumer_that_never_waits_binds(self) -> None:
        assert self.cost(160, wait_share=0.01).binding == "consumer"
