"""The stream on Ray Data is the plan, block by block and bit by bit."""

import subprocess
import sys

import numpy as np
import pytest

from raysl.augment.pipeline import Blur, ColorJitter, Crop, Flip, View
from raysl.data.plan import Plan
from raysl.data.source import ArraySource
from raysl.data.stream import Block, ItemMaker, iterate
from raysl.runtime.cluster import Layout
from raysl.runtime.ray_data import PlanSource, execution_options, iterate_shard, open_dataset

pytestmark = pytest.mark.ray

VIEWS = (View(count=2, size_px=16, crop=Crop(), ops=(Flip(), ColorJitter(), Blur())),)


def source() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (50, 20, 24, 3), dtype=np.uint8)
    return ArraySource("made up", images)


def plan(item_size: int = 4) -> Plan:
    return Plan([50], seed=3, global_batch_size=8, item_size=item_size, num_steps=15)


def layout(num_data_workers: int) -> Layout:
    return Layout(1, 1.0, num_data_workers, 0.9, False, 1, 1)


def same(found: Block, expected: Block) -> bool:
    return all(np.array_equal(found[name], expected[name]) for name in expected)


class TestPlanSource:
    @pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 100), (7, 258), (0, 1001), (5, 5)])
    def test_every_read_task_yields_as_many_items(self, start: int, stop: int) -> None:
        numbers = PlanSource(start, stop)
        blocks = [next(iter(task())) for task in numbers.get_read_tasks(1)]
        assert {block.num_rows for block in blocks} == {numbers.per_task}
        found = [n for block in blocks for n in block["position"].to_pylist()]
        assert found == list(range(start, start + numbers.num_items))
        assert start + numbers.num_items >= stop


class TestStream:
    @pytest.mark.parametrize("num_data_workers", [1, 2])
    @pytest.mark.parametrize("start_step", [0, 7])
    @pytest.mark.usefixtures("ray_cluster")
    def test_equals_the_same_plan_made_in_this_process(
        self, num_data_workers: int, start_step: int
    ) -> None:
        import ray

        data = ray.data.DataContext.get_current()
        data.execution_options = execution_options()
        dataset = open_dataset(
            ray.put(source()), plan(), VIEWS, start_step=start_step, layout=layout(num_data_workers)
        )
        found = iterate_shard(dataset.iterator, batch_size=8, prefetch_batches=2)
        expected = iterate(
            ItemMaker(source(), plan(), VIEWS),
            start_step=start_step,
            rank=0,
            world_size=1,
            num_threads=1,
        )
        steps = 0
        for mine, bare in zip(expected, found, strict=False):
            assert same(bare, mine)
            steps += 1
        assert steps == 15 - start_step


def test_the_processes_of_the_stream_load_no_torch() -> None:
    """Four of them start one after the other before the first batch; torch costs each seconds."""
    code = "import raysl.runtime.ray_data, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert {"raysl", "ray", "cv2"} <= loaded
    assert not loaded & {"torch", "torchvision", "sklearn", "scipy", "mlflow", "matplotlib"}
