"""The coordinator of an execution keeps as much after many blocks as after few."""

from contextlib import closing
from typing import Any

import numpy as np
import pytest

from raysl.augment.crop import Crop
from raysl.augment.pipeline import View
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.run.ray_bounds import KEPT_STATISTICS, MOST_NUMBERS_AHEAD
from raysl.run.ray_cluster import Layout
from raysl.run.ray_data import execution_options, iterate_shard, open_dataset
from raysl.sources.source import ArraySource

pytestmark = pytest.mark.ray

VIEWS = BlockSpec((View(count=2, size_px=8, crop=Crop()),))
BATCH, ITEM, STEPS = 8, 4, 200
BLOCKS_PER_STEP = BATCH // ITEM
# A few more arrive in the step in which a limit is reached, and blocks are on their way.
MARGIN = 16


@pytest.mark.usefixtures("ray_cluster")
def test_a_coordinator_keeps_no_more_after_a_hundred_and_sixty_blocks_than_after_forty() -> None:
    import ray

    images = np.zeros((50, 20, 24, 3), np.uint8)
    order = Plan([50], seed=3, global_batch_size=BATCH, item_size=ITEM, num_steps=STEPS)
    layout = Layout(1, 1.0, 1, 0.9, False, 1, 1)
    source = ray.put(ArraySource("made up", images))
    dataset = open_dataset(source, order, VIEWS, start_step=0, layout=layout)
    dataset.context.execution_options = execution_options()
    assert dataset.context.execution_no_progress_timeout_s == -1
    shard: Any = dataset.streaming_split(1, equal=True)[0]

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
    batches: Any = iterate_shard(
        lambda: shard, batch_size=BATCH, prefetch_batches=2, blocks_per_batch=BLOCKS_PER_STEP
    )
    with closing(batches):
        for step, _ in zip(range(1, 81), batches, strict=False):
            if step in (20, 80):
                found.append(ray.get(shard._coord_actor.__ray_call__.remote(kept)))
    early, late = found
    assert late["entries of blocks"] <= early["entries of blocks"] + MARGIN  # 120 blocks more
    assert 0 < late["numbers ahead"] <= MOST_NUMBERS_AHEAD + MARGIN
    assert late["statistics"] <= KEPT_STATISTICS + MARGIN
    assert late["slots"] <= MARGIN
    assert late["ended"] <= MARGIN
