"""Items of the plan to blocks of views: the function that every data worker calls.

Ray Data calls :class:`ItemMaker` in its actors, :func:`iterate` in threads of this process. Both
give the same pixels.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import cv2
import numpy as np
import numpy.typing as npt

from raysl.augment.pipeline import View, make_views
from raysl.data.decode import decode
from raysl.data.plan import Plan
from raysl.data.source import Source

Block = dict[str, npt.NDArray[np.uint8] | npt.NDArray[np.int64]]

INDEX, STEP = "index", "step"


def view_column(kind: int) -> str:
    """Return the name of a block's column for a kind of view."""
    return f"views_{kind}"


class ItemMaker:
    """Reads, decodes and augments one item of the plan.

    Args:
        source: Where the images are.
        plan: Their order.
        views: The kinds of view to make.
    """

    def __init__(self, source: Source, plan: Plan, views: Sequence[View]) -> None:
        self.source = source
        self.plan = plan
        self.views = tuple(views)
        # Parallel over items; OpenCV's own threads would fight over the same cores.
        cv2.setNumThreads(1)

    def __call__(self, position: int) -> Block:
        """Make the block of one position.

        Returns:
            ``views_0``, ``views_1``, ...: ``(item_size, V, S, S, 3)`` uint8 RGB, one column a kind
            of view; ``index``: ``(item_size,)`` int64, rows of the source; ``step``:
            ``(item_size,)`` int64, the optimizer step that this block belongs to. A position after
            the end of the run gives empty pixels: it only fills the last read task.

        Raises:
            DecodeError: If an image cannot be decoded.
        """
        size = self.plan.item_size
        blocks = [
            np.zeros((size, view.count, view.size_px, view.size_px, 3), dtype=np.uint8)
            for view in self.views
        ]
        indices = np.full(size, -1, dtype=np.int64)
        step = self.plan.num_steps
        if position < self.plan.num_items:
            _, step, epoch, indices = self.plan.item(position)
            encoded = self.source.read(indices)
            for row, (index, data) in enumerate(zip(indices.tolist(), encoded, strict=True)):
                image = decode(data, where=self.source.where(index))
                made = make_views(image, self.views, seed=self.plan.seed, epoch=epoch, index=index)
                for block, views in zip(blocks, made, strict=True):
                    for number, view in enumerate(views):
                        block[row, number] = view
        columns: Block = {view_column(kind): block for kind, block in enumerate(blocks)}
        return {**columns, INDEX: indices, STEP: np.full(size, step, dtype=np.int64)}


def iterate(
    make: ItemMaker,
    *,
    start_step: int,
    rank: int,
    world_size: int,
    num_threads: int,
    prefetch_steps: int = 2,
) -> Iterator[Block]:
    """Yield this rank's batch of each step, made by threads of this process, in order.

    Args:
        make: What makes an item.
        start_step: Global batches already consumed.
        rank: This worker, in [0, world_size).
        world_size: Workers that share a global batch.
        num_threads: Threads that make items, > 0.
        prefetch_steps: Batches to make ahead of the one in use.
    """
    plan = make.plan
    # Item by item round the ranks, as Ray's streaming split deals out its blocks.
    items = range(start_step * plan.items_per_step + rank, plan.num_items, world_size)
    per_batch = plan.items_per_step // world_size
    waiting: deque[Future[Block]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="raysl-views") as pool:
        try:
            upcoming = iter(items)
            for position in islice(upcoming, per_batch * (1 + prefetch_steps)):
                waiting.append(pool.submit(make, position))
            for _ in range(len(items) // per_batch):
                blocks = [waiting.popleft().result() for _ in range(per_batch)]
                for position in islice(upcoming, per_batch):
                    waiting.append(pool.submit(make, position))
                yield concatenate(blocks)
        finally:
            for future in waiting:
                future.cancel()


def concatenate(blocks: Sequence[Block]) -> Block:
    """Join the blocks of one batch; a single block is passed on without a copy."""
    if len(blocks) == 1:
        return blocks[0]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
