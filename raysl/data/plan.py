"""The order of data as arithmetic: (seed, position) -> which images, of which epoch.

A run is a sequence of *items*. An item is a fixed number of images that one data worker reads,
decodes and augments in one go; a fixed number of items makes a global batch. Nothing here has
state: where a run stands is one integer, the number of global batches consumed.

Images are shuffled in two stages, because a source may only be quick to read in groups (the row
groups of a Parquet file): the groups are permuted, cut into windows that fit into memory, and the
images of a window are permuted together. A source that fits into one window is shuffled fully.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.errors import ConfigError

Indices = npt.NDArray[np.int64]

# Second words of the Philox keys below: they keep the two stages and the views apart.
_GROUPS, _WINDOWS = 1 << 62, (1 << 62) + (1 << 61)
_CACHED_WINDOWS = 4
_MAX_ITEM_IMAGES = 128
_MAX_ITEM_BYTES = 96 << 20


class Item(NamedTuple):
    """The work of one data worker for one position of the plan."""

    position: int  # number of the item in the run
    step: int  # global batch, counted from 0 over the whole run
    epoch: int
    indices: Indices  # rows of the source, ``(item_size,)``


class Plan:
    """The order in which a run reads its images.

    Args:
        group_sizes: Images in each group of the source, in the order of its rows.
        seed: The run's seed, 0 <= seed < 2**63.
        global_batch_size: Images of one optimizer step over all workers.
        item_size: Images of one item; divides the global batch.
        num_steps: Optimizer steps of the whole run.
        window_size: Most images that are shuffled together; a larger group is a window by itself.
            None for all.

    Raises:
        ConfigError: If the batch is larger than the source or the item does not divide it.
    """

    def __init__(
        self,
        group_sizes: Sequence[int] | Indices,
        *,
        seed: int,
        global_batch_size: int,
        item_size: int,
        num_steps: int,
        window_size: int | None = None,
    ) -> None:
        self.group_sizes = np.asarray(group_sizes, dtype=np.int64)
        self.num_images = int(self.group_sizes.sum())
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.item_size = item_size
        self.num_steps = num_steps
        self.window_size = window_size or self.num_images
        if global_batch_size > self.num_images:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} is larger than the source, which has "
                f"{self.num_images:,} images; use at most {self.num_images}"
            )
        if global_batch_size % item_size:
            raise ConfigError(
                f"an item of {item_size} images does not divide "
                f"train.global_batch_size={global_batch_size}"
            )
        self._layouts: dict[int, _Layout] = {}
        self._windows: dict[tuple[int, int], Indices] = {}
        self._lock = threading.Lock()  # items are asked for by several threads

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}, "_windows": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in one pass; the rest is left out, another rest each epoch."""
        return self.num_images // self.global_batch_size

    @property
    def items_per_step(self) -> int:
        """Items in a global batch."""
        return self.global_batch_size // self.item_size

    @property
    def num_items(self) -> int:
        """Items of the whole run."""
        return self.num_steps * self.items_per_step

    def item(self, position: int) -> Item:
        """Return the work item at a position in [0, num_items)."""
        step, part = divmod(position, self.items_per_step)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_size + part * self.item_size
        return Item(position, step, epoch, self.indices(epoch, start, start + self.item_size))

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Return places [start, stop) of an epoch's order as rows of the source."""
        with self._lock:
            return self._indices(epoch, start, stop)

    def _indices(self, epoch: int, start: int, stop: int) -> Indices:
        bounds = self._layout(epoch).bounds
        window = int(np.searchsorted(bounds, start, side="right")) - 1
        parts = []
        while start < stop:
            low, high = int(bounds[window]), int(bounds[window + 1])
            end = min(stop, high)
            parts.append(self._window(epoch, window)[start - low : end - low])
            start, window = end, window + 1
        return np.concatenate(parts)

    def _layout(self, epoch: int) -> "_Layout":
        if epoch not in self._layouts:
            rng = _stream(self.seed, _GROUPS + epoch, 0)
            order = rng.permutation(len(self.group_sizes))
            sizes = self.group_sizes[order]
            ends = np.cumsum(sizes)
            cuts, taken = [0], 0
            while cuts[-1] < len(order):
                # The last group that still fits, but always at least one.
                stop = int(np.searchsorted(ends, taken + self.window_size, side="right"))
                cuts.append(max(stop, cuts[-1] + 1))
                taken = int(ends[cuts[-1] - 1])
            bounds = np.array([0, *(int(ends[cut - 1]) for cut in cuts[1:])], dtype=np.int64)
            _keep(self._layouts, epoch, _Layout(order, np.array(cuts), bounds))
        return self._layouts[epoch]

    def _window(self, epoch: int, window: int) -> Indices:
        key = (epoch, window)
        if key not in self._windows:
            layout = self._layout(epoch)
            starts = np.cumsum(self.group_sizes) - self.group_sizes
            groups = layout.order[layout.cuts[window] : layout.cuts[window + 1]]
            rows = np.concatenate(
                [np.arange(starts[g], starts[g] + self.group_sizes[g]) for g in groups]
            )
            _keep(
                self._windows, key, _stream(self.seed, _WINDOWS + epoch, window).permutation(rows)
            )
        return self._windows[key]


class _Layout(NamedTuple):
    """How an epoch's groups are ordered and cut into windows."""

    order: Indices  # groups, permuted
    cuts: Indices  # window w holds order[cuts[w] : cuts[w + 1]]
    bounds: Indices  # and places [bounds[w], bounds[w + 1]) of the epoch


def _stream(seed: int, stage: int, counter: int) -> np.random.Generator:
    key = np.array([seed, stage], dtype=np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], dtype=np.uint64))
    )


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Add to a cache that forgets its oldest entry: items are asked for almost in order."""
    if len(cache) >= _CACHED_WINDOWS:
        del cache[next(iter(cache))]
    cache[key] = value


def item_size_for(batch_size_per_worker: int, *, bytes_per_image: int) -> int:
    """Return the largest divisor of a worker's batch that makes a good item.

    An item costs a fixed 15 ms in Ray Data, so it should hold many images; a block of Ray Data
    should stay below 128 MiB, and a short item keeps the first step early.

    Args:
        batch_size_per_worker: Images a train worker takes in one step.
        bytes_per_image: Bytes of all views of one image.
    """
    most = max(1, min(_MAX_ITEM_IMAGES, _MAX_ITEM_BYTES // max(1, bytes_per_image)))
    return max(d for d in range(1, most + 1) if batch_size_per_worker % d == 0)
