"""A coordinator keeps as much after many blocks as after few, and waits while it can do nothing."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest

from raysl.augment.crop import Crop
from raysl.augment.pipeline import View
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.run.ray_bounds import KEPT_STATISTICS, LONGEST_PAUSE_S, MOST_NUMBERS_AHEAD
from raysl.run.ray_cluster import Layout
from raysl.run.ray_data import execution_options, iterate_shard, open_dataset
from raysl.sources.source import ArraySource

pytestmark = pytest.mark.ray

VIEWS = BlockSpec((View(count=2, size_px=8, crop=Crop()),))
BATCH, ITEM, STEPS = 8, 4, 200
BLOCKS_PER_STEP = BATCH // ITEM
# A few more arrive in the step in which a limit is reached, and blocks are on their way.
MARGIN = 16


@contextmanager
def stream(**limits: Any) -> Iterator[tuple[Any, Any]]:
    """Provide the batches of a run, and the actor that coordinates them."""
    import ray

    images = np.zeros((50, 20, 24, 3), np.uint8)
    order = Plan([50], seed=3, global_batch_size=BATCH, item_size=ITEM, num_steps=STEPS)
    layout = Layout(1, 1.0, 1, 0.9, False, 1, 1)
    source = ray.put(ArraySource("made up", images))
    dataset = open_dataset(source, order, VIEWS, start_step=0, layout=layout)
    assert dataset.context.execution_no_progress_timeout_s == -1
    dataset.context.execution_options = execution_options()
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(**limits)
    shard: Any = dataset.streaming_split(1, equal=True)[0]
    batches: Any = iterate_shard(
        lambda: shard, batch_size=BATCH, prefetch_batches=2, blocks_per_batch=BLOCKS_PER_STEP
    )
    with closing(batches):
        yield batches, shard._coord_actor


@pytest.mark.usefixtures("ray_cluster")
def test_a_coordinator_keeps_no_more_after_a_hundred_and_sixty_blocks_than_after_forty() -> None:
    import ray

    def kept(coordinator: Any) -> dict[str, int]:
        from ray._private.worker import global_worker

        executor = coordinator._current_executor
        _, read, made, _ = executor._topology
        ahead = executor._topology[read].total_enqueued_output_blocks()
        return {
            "entries of blocks": global_worker.core_worker.get_memory_store_size() - ahead,
            "numbers ahead": ahead,
            "statistics": max(len(op._output_blocks_stats) for op in (read, made)),
            "slots": max(len(op._output_queue._inner) for op in (read, made)),
            "ended": max(len(op._output_queue._finalized_keys) for op in (read, made)),
        }

    found = []
    with stream() as (batches, coordinator):
        for step, _ in zip(range(1, 81), batches, strict=False):
            if step in (20, 80):
                found.append(ray.get(coordinator.__ray_call__.remote(kept)))
    early, late = found
    assert late["entries of blocks"] <= early["entries of blocks"] + MARGIN  # 120 blocks more
    assert 0 < late["numbers ahead"] <= MOST_NUMBERS_AHEAD + MARGIN
    assert late["statistics"] <= KEPT_STATISTICS + MARGIN
    assert late["slots"] <= MARGIN
    assert late["ended"] <= MARGIN


@pytest.mark.usefixtures("ray_cluster")
def test_a_coordinator_without_room_for_outputs_waits_and_goes_on_when_one_is_taken() -> None:
    import ray

    def count_steps(coordinator: Any) -> None:
        executor = coordinator._current_executor
        step = executor._scheduling_loop_step
        executor.steps_done = 0

        def counted(topology: Any) -> Any:
            executor.steps_done += 1
            return step(topology)

        executor._scheduling_loop_step = counted

    def numbers(coordinator: Any) -> tuple[int, int]:
        executor = coordinator._current_executor
        _, _, made, _ = executor._topology
        return executor.steps_done, made.metrics.num_task_outputs_generated

    with stream(object_store_memory=100e3) as (batches, coordinator):
        next(batches)
        ray.get(coordinator.__ray_call__.remote(count_steps))
        seen: list[int] = []
        while len(seen) < 4 or len(set(seen[-4:])) > 1:  # until no block is made for 3 s
            time.sleep(1)
            steps, blocks = ray.get(coordinator.__ray_call__.remote(numbers))
            seen.append(blocks)
        assert blocks < STEPS * BLOCKS_PER_STEP
        began = time.monotonic()
        time.sleep(2)
        later, blocks_later = ray.get(coordinator.__ray_call__.remote(numbers))
        waited_s = time.monotonic() - began
        assert blocks_later == blocks
        assert later - steps <= waited_s / LONGEST_PAUSE_S + MARGIN  # hundreds without the pause
        taken = sum(1 for _ in batches)
    assert taken == STEPS - 1
