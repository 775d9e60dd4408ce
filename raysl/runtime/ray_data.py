"""The stream of a run on Ray Data: one execution from the first step to the last.

Four of Ray's processes import this file, one after the other, before the first batch: what it
imports is paid four times. So it knows neither torch nor the configuration.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from raysl.augment.pipeline import View
from raysl.data.plan import Plan
from raysl.data.stream import Block, ItemMaker
from raysl.runtime.background import in_background
from raysl.runtime.cluster import READ_CPUS, Layout
from raysl.track.run_folder import latest_step

_POSITION = "position"
_ITEMS_PER_READ_TASK = 100


class PlanSource(Datasource):
    """Yields the numbers of the items still to do, in order, one a block.

    A read task is one `ray.put` on the driver, so 10,000 of them would take 12 seconds before the
    first batch; here each yields many items. All have the same number, else Ray would split them
    unevenly and an item would no longer be a block: the last positions may lie past the end of
    the plan, where making an item costs nothing and nobody asks for it.

    Args:
        start: First position.
        stop: Position after the last.
    """

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start = start
        count = max(1, stop - start)
        self.per_task = min(_ITEMS_PER_READ_TASK, count)
        self.num_tasks = -(-count // self.per_task)

    @property
    def num_items(self) -> int:
        """Blocks of one item that all tasks yield."""
        return self.per_task * self.num_tasks

    def estimate_inmemory_data_size(self) -> int | None:
        """Return the size of the numbers in bytes."""
        return 8 * self.num_items

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return the tasks; Ray splits the block of each into its rows."""
        return [
            ReadTask(
                _reader(self.start + task * self.per_task, self.per_task),
                BlockMetadata(
                    num_rows=self.per_task,
                    size_bytes=8 * self.per_task,
                    input_files=None,
                    exec_stats=None,
                ),
                schema=pa.schema([(_POSITION, pa.int64())]),
            )
            for task in range(self.num_tasks)
        ]


def _reader(start: int, count: int) -> Callable[[], Iterable[pa.Table]]:
    return lambda: [pa.table({_POSITION: np.arange(start, start + count, dtype=np.int64)})]


class MakeItems:
    """A data worker: an actor that reads, decodes and augments items."""

    def __init__(self, source: Any, plan: Plan, views: tuple[View, ...]) -> None:
        # The source is one object in the store of each node, shared by its data workers.
        self._make = ItemMaker(ray.get(source), plan, views)

    def __call__(self, batch: dict[str, np.ndarray]) -> Block:
        """Make the one item of this block."""
        return self._make(int(batch[_POSITION][0]))


def execution_options() -> ExecutionOptions:
    """Return options under which position p reaches rank p % world_size, whatever is slow."""
    return ExecutionOptions(preserve_order=True)


def open_dataset(
    source: Any, plan: Plan, views: tuple[View, ...], *, start_step: int, layout: Layout
) -> Dataset:
    """Describe the rest of a run, from ``start_step`` on, as one dataset.

    Args:
        source: Reference of the source in the object store.
        plan: The order of the images.
        views: What to make of them.
        start_step: Global batches already consumed.
        layout: How many data workers there are.

    Returns:
        Blocks of exactly ``plan.item_size`` rows with the columns of :class:`ItemMaker`.
    """
    numbers = PlanSource(start_step * plan.items_per_step, plan.num_items)
    dataset: Dataset = ray.data.read_datasource(
        numbers, override_num_blocks=numbers.num_items, num_cpus=READ_CPUS, concurrency=1
    ).map_batches(
        MakeItems,
        fn_constructor_args=(source, plan, views),
        batch_size=1,
        compute=ActorPoolStrategy(size=layout.num_data_workers),
        num_cpus=layout.cpus_per_data_worker,
    )
    return dataset


class OpenRest:
    """What Ray Train calls at each start of the workers to open the rest of the run's data.

    Args:
        source: Reference of the source in the object store.
        plan: The order of the images.
        views: What to make of them.
        checkpoints: Folder whose newest complete checkpoint says where to begin.
        layout: How many data workers there are.
    """

    def __init__(
        self,
        source: Any,
        plan: Plan,
        views: tuple[View, ...],
        *,
        checkpoints: Path,
        layout: Layout,
    ) -> None:
        self.source = source
        self.plan = plan
        self.views = views
        self.checkpoints = checkpoints
        self.layout = layout

    def __call__(self) -> Dataset:
        """Open the plan from the newest complete checkpoint on."""
        return open_dataset(
            self.source,
            self.plan,
            self.views,
            start_step=latest_step(self.checkpoints),
            layout=self.layout,
        )


def iterate_shard(
    open_shard: Callable[[], Any], *, batch_size: int, prefetch_batches: int
) -> Iterator[Block]:
    """Yield this worker's batches; a batch that is one block is a view of the object store.

    The stream starts at this call, in a thread of its own, and not when the first batch is asked
    for: its actors take seconds to come up, which is time to build the model.

    Args:
        open_shard: Returns the worker's part of the dataset.
        batch_size: Images of a batch.
        prefetch_batches: Batches to hold ready.
    """

    def begin() -> tuple[Block | None, Iterator[Block]]:
        batches = iter(
            open_shard().iter_batches(
                batch_size=batch_size,
                batch_format="numpy",
                prefetch_batches=prefetch_batches,
                drop_last=True,
            )
        )
        return next(batches, None), batches

    begun = in_background(begin, name="raysl-first-batch")

    def batches() -> Iterator[Block]:
        first, rest = begun.result()
        if first is not None:
            yield first
            yield from rest

    return batches()
