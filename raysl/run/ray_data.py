"""Stream the batches of a run through Ray Data, in one execution from first to last step.

Four of Ray's processes import this file, one after the other, before the first batch: what it
imports is paid four times. So it knows neither torch nor the configuration.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from raysl.data.block import INDEX, Block, is_view_column
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec, ItemMaker, concatenate
from raysl.run.background import in_background
from raysl.run.ray_cluster import READ_CPUS, Layout
from raysl.track.run_folder import latest_step

_NUMBER = "number"
_BLOCKS_PER_READ_TASK = 100
# A block of several steps holds at most so much, and a run has at least so many of them, so that
# many data workers share a short one.
_BLOCK_IMAGES = 4096
_BLOCK_BYTES = 32 << 20
_FEWEST_BLOCKS = 32


class PlanSource(Datasource):
    """Yields the numbers of the blocks still to make, in order, one a block.

    A read task is one `ray.put` on the driver, so 10,000 of them would take 12 seconds before the
    first batch; here each yields many numbers. All have as many, else Ray would split them
    unevenly and a number would no longer be a block: the last ones may lie past the end of the
    plan, where making a block costs nothing and nobody asks for it.

    Args:
        count: Blocks to make.
    """

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.per_task = min(_BLOCKS_PER_READ_TASK, max(1, count))
        self.num_tasks = -(-max(1, count) // self.per_task)

    @property
    def num_blocks(self) -> int:
        """Blocks that all tasks yield."""
        return self.per_task * self.num_tasks

    def estimate_inmemory_data_size(self) -> int | None:
        """Return the size of the numbers in bytes."""
        return 8 * self.num_blocks

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return the tasks; Ray splits the block of each into its rows."""
        return [
            ReadTask(
                _reader(task * self.per_task, self.per_task),
                BlockMetadata(
                    num_rows=self.per_task,
                    size_bytes=8 * self.per_task,
                    input_files=None,
                    exec_stats=None,
                ),
                schema=pa.schema([(_NUMBER, pa.int64())]),
            )
            for task in range(self.num_tasks)
        ]


def _reader(start: int, count: int) -> Callable[[], Iterable[pa.Table]]:
    return lambda: [pa.table({_NUMBER: np.arange(start, start + count, dtype=np.int64)})]


class Packing(NamedTuple):
    """How the items of the plan are packed into blocks.

    A block costs some 15 ms of Ray Data's time whatever it holds. Where an item is the whole batch
    of a worker and small, a block therefore holds the batches of several steps of that worker.
    """

    start_step: int
    num_workers: int
    steps_per_block: int

    def num_blocks(self, plan: Plan) -> int:
        """Return the blocks that the rest of the plan takes."""
        items = (plan.num_steps - self.start_step) * plan.items_per_step
        if self.steps_per_block == 1:
            return items
        return -(-items // (self.num_workers * self.steps_per_block)) * self.num_workers

    def positions(self, block: int, plan: Plan) -> list[int]:
        """Return the items of a block; those beyond the end of the plan are empty."""
        first = self.start_step * plan.items_per_step
        if self.steps_per_block == 1:
            return [first + block]
        turn, rank = divmod(block, self.num_workers)
        return [
            first + (turn * self.steps_per_block + step) * plan.items_per_step + rank
            for step in range(self.steps_per_block)
        ]


def packing_for(plan: Plan, spec: BlockSpec, *, start_step: int, num_workers: int) -> Packing:
    """Return how to pack the rest of a plan for so many train workers."""
    bytes_per_image = sum(3 * view.count * view.size_px**2 for view in spec.views)
    steps = 1
    if plan.items_per_step == num_workers:
        images = min(_BLOCK_IMAGES, _BLOCK_BYTES // bytes_per_image)
        steps_left = plan.num_steps - start_step
        steps = max(1, min(images // plan.item_size, steps_left // _FEWEST_BLOCKS))
    return Packing(start_step, num_workers, steps)


class MakeItems:
    """A data worker: an actor that reads, decodes and augments items."""

    def __init__(self, source: Any, plan: Plan, spec: BlockSpec, packing: Packing) -> None:
        # The source is one object in the store of each node, shared by its data workers.
        self._make = ItemMaker(ray.get(source), plan, spec)
        self._packing = packing

    def __call__(self, batch: dict[str, np.ndarray]) -> Block:
        """Make the items of this block."""
        positions = self._packing.positions(int(batch[_NUMBER][0]), self._make.plan)
        return concatenate([self._make(position) for position in positions])


def execution_options() -> ExecutionOptions:
    """Return options under which position p reaches rank p % world_size, whatever is slow."""
    return ExecutionOptions(preserve_order=True)


def open_dataset(
    source: Any, plan: Plan, spec: BlockSpec, *, start_step: int, layout: Layout
) -> Dataset:
    """Describe the rest of a run, from ``start_step`` on, as one dataset.

    Args:
        source: Reference of the source in the object store.
        plan: The order of the images.
        spec: The views to make.
        start_step: Global batches already consumed.
        layout: How many data workers and train workers there are.

    Returns:
        Blocks of one constant number of rows with the columns of :class:`ItemMaker`: an item, or
        the items of several steps of one train worker.
    """
    packing = packing_for(plan, spec, start_step=start_step, num_workers=layout.num_train_workers)
    numbers = PlanSource(packing.num_blocks(plan))
    dataset: Dataset = ray.data.read_datasource(
        numbers, override_num_blocks=numbers.num_blocks, num_cpus=READ_CPUS, concurrency=1
    ).map_batches(
        MakeItems,
        fn_constructor_args=(source, plan, spec, packing),
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
        spec: The views to make.
        checkpoints: Folder whose newest complete checkpoint says where to begin.
        layout: How many data workers there are.
    """

    def __init__(
        self,
        source: Any,
        plan: Plan,
        spec: BlockSpec,
        *,
        checkpoints: Path,
        layout: Layout,
    ) -> None:
        self.source = source
        self.plan = plan
        self.spec = spec
        self.checkpoints = checkpoints
        self.layout = layout

    def __call__(self) -> Dataset:
        """Open the plan from the newest complete checkpoint on."""
        return open_dataset(
            self.source,
            self.plan,
            self.spec,
            start_step=latest_step(self.checkpoints),
            layout=self.layout,
        )


def iterate_shard(
    open_shard: Callable[[], Any],
    *,
    batch_size: int,
    prefetch_batches: int,
    blocks_per_batch: int = 1,
) -> Iterator[Block]:
    """Yield this worker's batches, whose pixels stay where they are in the object store.

    The stream starts at this call, in a thread of its own, and not when the first batch is asked
    for: its actors take seconds to come up, which is time to build the model.

    Args:
        open_shard: Returns the worker's part of the dataset.
        batch_size: Images of a batch.
        prefetch_batches: Batches to hold ready.
        blocks_per_batch: Blocks that make a batch; 1 also where a block holds several batches.

    Yields:
        The columns of :class:`ItemMaker`; those of the views as arrays, or, where several blocks
        make a batch, as tuples of arrays: joining them would copy every pixel once more.
    """

    def begin() -> tuple[Block | None, Iterator[Block]]:
        blocks = open_shard().iter_batches(
            batch_size=None,
            batch_format="numpy",
            prefetch_batches=prefetch_batches * blocks_per_batch,
        )
        batches = regroup(blocks, batch_size=batch_size)
        return next(batches, None), batches

    begun = in_background(begin, name="raysl-first-batch")

    def batches() -> Iterator[Block]:
        first, rest = begun.result()
        if first is not None:
            yield first
            yield from rest

    return batches()


def regroup(blocks: Iterable[Block], *, batch_size: int) -> Iterator[Block]:
    """Cut blocks of several batches, or put several blocks of one batch together."""
    parts: list[Block] = []
    for block in blocks:
        rows = len(block[INDEX])
        for start in range(0, rows, batch_size):
            parts.append(
                {name: column[start : start + batch_size] for name, column in block.items()}
            )
            if sum(len(part[INDEX]) for part in parts) == batch_size:
                yield parts[0] if len(parts) == 1 else _together(parts)
                parts = []


def _together(parts: list[Block]) -> Block:
    return {
        name: tuple(part[name] for part in parts)
        if is_view_column(name)
        else np.concatenate([part[name] for part in parts])
        for name in parts[0]
    }
