"""Stream the batches of a run through Ray Data, in executions that last from first to last step.

Four Ray processes import this module one after the other before the first batch, so each import
costs its time four times. It therefore imports neither torch nor the configuration.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from raysl.data.block import INDEX, Block, is_view_column
from raysl.data.plan import Plan, item_size_for
from raysl.data.stream import BlockSpec, ItemMaker, concatenate
from raysl.run.nodes import ANYWHERE, Roles
from raysl.run.rank_groups import MOST_RANKS, RankGroup, rank_groups
from raysl.run.ray_bounds import bound_execution
from raysl.run.ray_cluster import READ_CPUS, ClusterNeeds, Layout, in_background, layout_for

_FirstBatch = tuple[Block | None, Iterator[Block]]
_NUMBER = "number"
_BLOCKS_PER_READ_TASK = 100
_MOST_READ_TASKS = 1000
# Limits of a block that holds several steps, and the fewest blocks of a run, so that many data
# workers share a short run.
_BLOCK_IMAGES = 4096
_BLOCK_BYTES = 32 << 20
_FEWEST_BLOCKS = 32


class PlanSource(Datasource):
    """Yields the numbers of the remaining blocks in order, one number per block.

    A read task is one `ray.put` on the driver, so 10,000 of them would take 12 seconds before the
    first batch; here each task yields many numbers, and there are at most a thousand tasks. All
    tasks yield the same count, or Ray would split them unevenly and a block would no longer be one
    number. The last numbers may therefore lie past the end of the plan, where blocks are empty and
    never consumed.

    Args:
        count: Number of blocks to make.
    """

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        count = max(1, count)
        self.per_task = max(min(_BLOCKS_PER_READ_TASK, count), -(-count // _MOST_READ_TASKS))
        self.num_tasks = -(-count // self.per_task)

    @property
    def num_blocks(self) -> int:
        """Number of blocks that all tasks yield."""
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
        """Return the read tasks; Ray splits each task's output into blocks of one row."""
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
    """The assignment of the plan's items to the blocks of one execution.

    Ray Data spends about 15 ms per block, independent of its size. If an item is a train worker's
    whole batch and small, a block therefore holds that worker's batches of several steps. Block
    after block goes to the ranks of the execution in turn.
    """

    start_step: int
    num_workers: int
    steps_per_block: int
    ranks: range

    def num_blocks(self, plan: Plan) -> int:
        """Return the number of blocks for the rest of the plan."""
        items = (plan.num_steps - self.start_step) * plan.items_per_step
        return -(-items // (self.num_workers * self.steps_per_block)) * len(self.ranks)

    def positions(self, block: int, plan: Plan) -> list[int]:
        """Return the positions of a block's items; items past the end of the plan are empty."""
        turn, place = divmod(block, len(self.ranks))
        first = self.start_step * plan.items_per_step + self.ranks[place]
        return [
            first + (turn * self.steps_per_block + step) * self.num_workers
            for step in range(self.steps_per_block)
        ]


def packing_for(
    plan: Plan, spec: BlockSpec, *, start_step: int, num_workers: int, ranks: range | None = None
) -> Packing:
    """Return the packing for the rest of a plan from ``start_step`` on.

    Args:
        plan: The order of the images.
        spec: The views of a block.
        start_step: Number of global batches already consumed.
        num_workers: Number of train workers.
        ranks: The train workers of the execution; None means all.
    """
    steps = 1
    if plan.items_per_step == num_workers:
        images = min(_BLOCK_IMAGES, _BLOCK_BYTES // spec.bytes_per_image)
        steps_left = plan.num_steps - start_step
        steps = max(1, min(images // plan.item_size, steps_left // _FEWEST_BLOCKS))
    return Packing(start_step, num_workers, steps, range(num_workers) if ranks is None else ranks)


class MakeItems:
    """A data worker: an actor that reads, decodes and augments items."""

    def __init__(self, source: Any, plan: Plan, spec: BlockSpec, packing: Packing) -> None:
        # All data workers of a node share one copy of the source in its object store.
        self._make = ItemMaker(ray.get(source), plan, spec)
        self._packing = packing

    def __call__(self, batch: dict[str, np.ndarray]) -> Block:
        """Make the items of the block whose number is in ``batch``."""
        positions = self._packing.positions(int(batch[_NUMBER][0]), self._make.plan)
        return concatenate([self._make(position) for position in positions])


def execution_options(roles: Roles = ANYWHERE) -> ExecutionOptions:
    """Return options that keep the order: position p reaches rank p % world_size.

    All tasks and actors of the stream are then on the nodes that make views.
    """
    labels = None if roles.data_on is None else dict(roles.data_on)
    return ExecutionOptions(preserve_order=True, label_selector=labels)


def open_dataset(
    source: Any,
    plan: Plan,
    spec: BlockSpec,
    *,
    start_step: int,
    layout: Layout,
    group: RankGroup | None = None,
) -> Dataset:
    """Return the lazy dataset of a run from ``start_step`` to its end.

    Args:
        source: Object reference of the source.
        plan: The order of the images.
        spec: The views to make.
        start_step: Number of global batches already consumed.
        layout: Numbers of data workers and train workers.
        group: The train workers whose items these are, of several groups; None means all.

    Returns:
        Blocks with the columns of :class:`ItemMaker` and the same number of rows each: one item,
        or the items of several steps of one train worker.
    """
    packing = packing_for(
        plan,
        spec,
        start_step=start_step,
        num_workers=layout.num_train_workers,
        ranks=None if group is None else group.ranks,
    )
    numbers = PlanSource(packing.num_blocks(plan))
    dataset: Dataset = ray.data.read_datasource(
        numbers,
        override_num_blocks=numbers.num_blocks,
        # Executions share the CPUs of each node in whole numbers. The share of one of many may be
        # zero, and a read task that asked for any of it would wait for ever.
        num_cpus=READ_CPUS if group is None else 0,
        concurrency=1,
    ).map_batches(
        MakeItems,
        fn_constructor_args=(source, plan, spec, packing),
        batch_size=1,
        compute=ActorPoolStrategy(
            size=layout.num_data_workers if group is None else group.num_data_workers
        ),
        num_cpus=layout.cpus_per_data_worker,
    )
    bound_execution(dataset.context)
    return dataset


class Stream(NamedTuple):
    """The lazy dataset of some train workers."""

    ranks: range
    dataset: Dataset


class RemainingDataset:
    """Factory of a run's datasets: Ray Train calls it at each start of the workers.

    Args:
        source: Object reference of the source.
        plan: The order of the images, in items for the fewest train workers of the run.
        spec: The views to make.
        newest_step: Returns the step of the newest complete checkpoint, which is the first step.
        needs: What the run asks of the cluster. Data workers are planned at each start, because
            nodes may have gone or come since the last.

    Attributes:
        most_ranks: Largest number of train workers that share an execution of Ray Data.
        num_workers: Number of train workers of the start; the controller sets it before each.
    """

    def __init__(
        self,
        source: Any,
        plan: Plan,
        spec: BlockSpec,
        *,
        newest_step: Callable[[], int],
        needs: ClusterNeeds,
    ) -> None:
        self.source = source
        self.plan = plan
        self.spec = spec
        self.newest_step = newest_step
        self.needs = needs
        self.most_ranks = MOST_RANKS
        self.num_workers = needs.worker_counts[0]

    def __call__(self) -> list[Stream]:
        """Return the dataset of each group of ranks from the newest complete checkpoint on.

        Raises:
            ClusterError: If the nodes that are left have no CPU to make views.
            RunFolderError: If the store of the run's folder cannot be reached.
        """
        plan = self.plan
        if self.num_workers != self.needs.worker_counts[0]:
            plan = plan_for(plan, self.spec, num_workers=self.num_workers)
        layout = layout_for(self.needs._replace(worker_counts=(self.num_workers,)))
        groups = rank_groups(
            layout.num_train_workers, layout.num_data_workers, most_ranks=self.most_ranks
        )
        start_step = self.newest_step()
        return [
            Stream(
                group.ranks,
                open_dataset(
                    self.source,
                    plan,
                    self.spec,
                    start_step=start_step,
                    layout=layout,
                    group=group if len(groups) > 1 else None,
                ),
            )
            for group in groups
        ]


def plan_for(plan: Plan, spec: BlockSpec, *, num_workers: int) -> Plan:
    """Return the same order of images, in items that suit so many train workers."""
    batch_size = plan.global_batch_size // num_workers
    return plan.with_item_size(item_size_for(batch_size, bytes_per_image=spec.bytes_per_image))


def iterate_shard(
    open_shard: Callable[[], Any],
    *,
    batch_size: int,
    prefetch_batches: int,
    blocks_per_batch: int = 1,
    wait: Callable[["Future[_FirstBatch]"], _FirstBatch] = Future.result,
) -> Iterator[Block]:
    """Yield this worker's batches; their pixels stay in the object store.

    The stream starts in its own thread at this call, not when the first batch is requested: its
    actors take seconds to start, in which the model is built.

    Args:
        open_shard: Returns the worker's shard of the dataset.
        batch_size: Images per batch.
        prefetch_batches: Number of batches to prefetch.
        blocks_per_batch: Blocks per batch; 1 if a block holds one or several batches.
        wait: Waits for the first batch.

    Yields:
        The columns of :class:`ItemMaker`. If several blocks make a batch, the view columns are
        tuples of arrays: concatenating them would copy every pixel once more.
    """

    def begin() -> _FirstBatch:
        blocks = open_shard().iter_batches(
            batch_size=None,
            batch_format="numpy",
            prefetch_batches=prefetch_batches * blocks_per_batch,
        )
        batches = regroup(blocks, batch_size=batch_size)
        return next(batches, None), batches

    first_batch = in_background(begin, name="raysl-first-batch")

    def batches() -> Iterator[Block]:
        first, rest = wait(first_batch)
        if first is not None:
            yield first
            yield from rest

    return batches()


def regroup(blocks: Iterable[Block], *, batch_size: int) -> Iterator[Block]:
    """Yield batches: parts of larger blocks, or several smaller blocks joined."""
    parts: list[Block] = []
    for block in blocks:
        rows = len(block[INDEX])
        for start in range(0, rows, batch_size):
            parts.append(
                {name: column[start : start + batch_size] for name, column in block.items()}
            )
            if sum(len(part[INDEX]) for part in parts) == batch_size:
                yield parts[0] if len(parts) == 1 else _join(parts)
                parts = []


def _join(parts: list[Block]) -> Block:
    return {
        name: tuple(part[name] for part in parts)
        if is_view_column(name)
        else np.concatenate([part[name] for part in parts])
        for name in parts[0]
    }
