"""Make blocks of views from items of the plan.

Every data worker uses :class:`ItemMaker`: Ray Data calls it in actors, :func:`iterate` in threads
of this process. Both produce the same pixels.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import cv2
import numpy as np

from raysl.augment.crop import Image
from raysl.augment.pipeline import (
    View,
    ViewPlan,
    apply_view,
    device_numbers,
    device_ops,
    largest_shrink,
    num_device_numbers,
    plan_views,
    shrink_plan,
)
from raysl.augment.random import replacement_stream
from raysl.data.block import BAD, FLAW, INDEX, STEP, Block, numbers_column, view_column
from raysl.data.decode import JPEG_SHRINKS, Flaw, decode_or_flaw, flaw_error
from raysl.data.plan import Plan
from raysl.errors import DataError
from raysl.sources.source import BadImagesConfig, Encoded, Source

# After this many bad images in a row, assume that the whole source is bad.
_MAX_DRAWS = 100


@dataclass(frozen=True)
class BlockSpec:
    """How to make a block from images.

    Args:
        views: The kinds of view.
        color_on: Whether the last operations of each view run here or on the accelerator.
        bad_images: What to do with an image that does not decode.
    """

    views: tuple[View, ...]
    color_on: Literal["cpu", "device"] = "cpu"
    bad_images: BadImagesConfig = field(default_factory=BadImagesConfig)

    @property
    def bytes_per_image(self) -> int:
        """Bytes of all views of one image."""
        return sum(3 * view.count * view.size_px**2 for view in self.views)


class ItemMaker:
    """Read, decode and augment one item of the plan.

    Args:
        source: The source of the images.
        plan: The order in which the run reads them.
        spec: The views to make, and what to do with bad images.
    """

    def __init__(self, source: Source, plan: Plan, spec: BlockSpec) -> None:
        self.source = source
        self.plan = plan
        self.spec = spec
        self.views = spec.views
        on_device = spec.color_on == "device"
        self._on_device = [device_ops(view) if on_device else () for view in spec.views]
        self._max_pixels = 1e6 * spec.bad_images.max_megapixels
        # Items already run in parallel; OpenCV's own threads would compete for the same cores.
        cv2.setNumThreads(1)
        # Bad images are counted and listed elsewhere; OpenCV would print a line for each.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

    def __call__(self, position: int) -> Block:
        """Make the block of one position.

        Returns:
            These columns, each of length ``item_size``:

            - ``views_0``, ``views_1``, ...: ``(item_size, V, S, S, 3)`` uint8 RGB, for each kind of
              view.
            - ``numbers_0``, ...: ``(item_size, V, P)`` float32, only with ``color_on: device``: the
              plans of the operations that the device runs.
            - ``index``: int64, the row of the source.
            - ``step``: int64, the optimizer step that uses the block.
            - ``bad``: int64, the bad row that this image replaces, else -1.
            - ``flaw``: uint8, the flaw of the bad row, else 0.

            A position past the end of the run yields blank views, to fill the last read task.

        Raises:
            DecodeError: If an image is bad and the policy is ``fail``.
            DataError: If no good image is found to replace a bad one.
        """
        block = self._empty()
        if position < self.plan.num_items:
            _, step, epoch, indices, keys = self.plan.item(position)
            block[INDEX][:] = indices
            block[STEP][:] = step
            encoded = self.source.read(indices)
            for row, data in enumerate(encoded):
                flaw = self._fill(
                    block, row, data, index=int(indices[row]), epoch=epoch, key=int(keys[row])
                )
                if flaw is not None:
                    if self.spec.bad_images.policy == "fail":
                        raise flaw_error(flaw, data, where=self.source.where(int(indices[row])))
                    block[BAD][row], block[FLAW][row] = indices[row], flaw
            for row in np.flatnonzero(block[BAD] >= 0).tolist():
                self._replace(block, row, encoded, epoch, int(keys[row]))
        return block

    def _empty(self) -> Block:
        size = self.plan.item_size
        block: Block = {
            view_column(kind): np.zeros(
                (size, view.count, view.size_px, view.size_px, 3), dtype=np.uint8
            )
            for kind, view in enumerate(self.views)
        }
        if self.spec.color_on == "device":
            for kind, view in enumerate(self.views):
                shape = (size, view.count, num_device_numbers(self._on_device[kind]))
                block[numbers_column(kind)] = np.zeros(shape, dtype=np.float32)
        return block | {
            INDEX: np.full(size, -1, dtype=np.int64),
            STEP: np.full(size, self.plan.num_steps, dtype=np.int64),
            BAD: np.full(size, -1, dtype=np.int64),
            FLAW: np.zeros(size, dtype=np.uint8),
        }

    def _fill(
        self, block: Block, row: int, encoded: Encoded, *, index: int, epoch: int, key: int
    ) -> Flaw | None:
        """Write the views of one image into a row of the block, or return the image's flaw."""
        planner = _Planner(self.views, seed=self.plan.seed, epoch=epoch, key=key)
        image = decode_or_flaw(
            encoded, self.source.decoding(index), max_pixels=self._max_pixels, shrink=planner.shrink
        )
        if isinstance(image, Flaw):
            return image
        for kind, planned in enumerate(planner.for_image(image)):
            view, ops = self.views[kind], self._on_device[kind]
            num_ops = len(view.ops) - len(ops)
            pixels = block[view_column(kind)]
            for number, plan in enumerate(planned):
                pixels[row, number] = apply_view(view, image, plan, num_ops=num_ops)
                if ops:
                    numbers = device_numbers(ops, plan, size_px=view.size_px)
                    block[numbers_column(kind)][row, number] = numbers
        return None

    def _replace(
        self, block: Block, row: int, encoded: Sequence[Encoded], epoch: int, key: int
    ) -> None:
        """Fill a bad image's row with another image, chosen by seed, epoch and key alone.

        Its views are drawn by the bad image's key, so they differ from the other image's own views.
        """
        rng = replacement_stream(seed=self.plan.seed, epoch=epoch, key=key)
        bad = int(block[BAD][row])
        good = np.flatnonzero(block[BAD] < 0)
        if self.spec.bad_images.policy == "skip" and good.size:
            good_row = int(good[rng.integers(good.size)])
            block[INDEX][row] = block[INDEX][good_row]
            index = int(block[INDEX][good_row])
            self._fill(block, row, encoded[good_row], index=index, epoch=epoch, key=key)
            return
        sizes = self.source.group_sizes
        ends = np.cumsum(sizes)  # not cached, because bad images are rare
        group = int(np.searchsorted(ends, bad, side="right"))
        low, high = int(ends[group] - sizes[group]), int(ends[group])
        for draw in range(_MAX_DRAWS):
            if draw >= _MAX_DRAWS // 2:  # perhaps the whole group is bad
                low, high = 0, int(ends[-1])
            other = int(rng.integers(low, high))
            data = self.source.read([other])[0]
            if self._fill(block, row, data, index=other, epoch=epoch, key=key) is None:
                block[INDEX][row] = other
                return
        raise DataError(
            f"{self.source.where(bad)} is bad ({Flaw(int(block[FLAW][row])).reason}), and so were "
            f"{_MAX_DRAWS} others drawn to take its place; look at the source with `raysl data`"
        )


class _Planner:
    """Draws the view plans of one image as soon as its size is known."""

    def __init__(self, views: Sequence[View], *, seed: int, epoch: int, key: int) -> None:
        self.views = views
        self._stream = {"seed": seed, "epoch": epoch, "index": key}
        self._plans: list[list[ViewPlan]] | None = None
        self._factor = 1

    def shrink(self, height: int, width: int) -> int:
        """Draw the plans for an image of this size and return the factor to decode it at."""
        self._plans = plan_views(self.views, height=height, width=width, **self._stream)
        self._factor = largest_shrink(self.views, self._plans, JPEG_SHRINKS)
        return self._factor

    def for_image(self, image: Image) -> list[list[ViewPlan]]:
        """Return the plans of each kind of view, scaled to the size of the decoded image."""
        height, width = image.shape[:2]
        if self._plans is None:
            return plan_views(self.views, height=height, width=width, **self._stream)
        if self._factor == 1:
            return self._plans
        return [
            [shrink_plan(plan, self._factor, height=height, width=width) for plan in planned]
            for planned in self._plans
        ]


def iterate(
    make: ItemMaker,
    *,
    start_step: int,
    rank: int,
    world_size: int,
    num_threads: int,
    prefetch_steps: int = 2,
) -> Iterator[Block]:
    """Yield this rank's batch of each step in order, made by threads of this process.

    Args:
        make: Makes the block of a position.
        start_step: Number of global batches already consumed.
        rank: Rank of this worker, in [0, world_size).
        world_size: Number of workers that share a global batch.
        num_threads: Number of threads that make items, > 0.
        prefetch_steps: Number of batches to make ahead of the current one.
    """
    plan = make.plan
    # Deal out items round-robin over the ranks, as Ray's streaming split does with blocks.
    items = range(start_step * plan.items_per_step + rank, plan.num_items, world_size)
    per_batch = plan.items_per_step // world_size
    pending: deque[Future[Block]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="raysl-views") as pool:
        try:
            upcoming = iter(items)
            for position in islice(upcoming, per_batch * (1 + prefetch_steps)):
                pending.append(pool.submit(make, position))
            for _ in range(len(items) // per_batch):
                blocks = [pending.popleft().result() for _ in range(per_batch)]
                for position in islice(upcoming, per_batch):
                    pending.append(pool.submit(make, position))
                yield concatenate(blocks)
        finally:
            for future in pending:
                future.cancel()


def concatenate(blocks: Sequence[Block]) -> Block:
    """Concatenate the blocks of one batch; return a single block without a copy."""
    if len(blocks) == 1:
        return blocks[0]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def join_chunks(batch: Block) -> Block:
    """Concatenate the columns of a batch that are tuples of chunks, so that all are arrays."""
    return {n: np.concatenate(c) if isinstance(c, tuple) else c for n, c in batch.items()}
