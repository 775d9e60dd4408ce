"""What `raysl benchmark plan` measures is the plan of a run."""

import numpy as np
import pytest

from raysl.benchmark.plan import (
    KINDS,
    build,
    group_sizes,
    measure,
    measure_in_own_process,
)


class TestGroups:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("num_images", [1, 99, 100, 101, 12_345])
    def test_hold_all_images(self, kind: str, num_images: int) -> None:
        sizes = group_sizes(kind, num_images)
        assert sizes.sum() == num_images
        assert sizes.min() > 0

    def test_of_a_folder_are_one_and_those_of_shards_many(self) -> None:
        assert len(group_sizes("folder", 10**6)) == 1
        assert len(group_sizes("shards", 10**6)) == 10**4


class TestMeasure:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("num_images", [1, 50, 20_000])
    def test_gives_a_figure_for_everything(self, kind: str, num_images: int) -> None:
        cost = measure(kind, num_images)
        assert cost.problem is None
        figures = cost._asdict().items()
        assert all(value is not None for name, value in figures if name != "problem")
        assert cost.plan_bytes is not None
        assert cost.table_bytes is not None
        assert cost.plan_bytes > cost.table_bytes >= 8 * len(group_sizes(kind, num_images))

    def test_the_peak_holds_the_group_sizes(self) -> None:
        cost = measure("shards", 10**6)
        assert cost.peak_bytes is not None
        assert cost.peak_bytes > group_sizes("shards", 10**6).nbytes

    def test_the_plan_is_an_epoch_of_every_image(self) -> None:
        plan = build("shards", group_sizes("shards", 8192))
        items = range(plan.items_per_step * plan.steps_per_epoch)
        seen = np.concatenate([plan.item(position).indices for position in items])
        assert sorted(seen) == list(range(8192))


class TestOwnProcess:
    def test_measures_the_same_things(self) -> None:
        found = measure_in_own_process("shards", 10_000)
        assert found["problem"] is None
        assert found["plan_bytes"] == measure("shards", 10_000).plan_bytes

    def test_a_plan_that_does_not_fit_is_told_and_not_raised(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Little:
            available = 1 << 20

        monkeypatch.setattr("psutil.virtual_memory", Little)
        found = measure_in_own_process("shards", 10**9)
        assert found["peak_bytes"] is None
        assert found["problem"]
