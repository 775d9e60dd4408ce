"""Compute the order of the data: (seed, position) -> the images of one item.

The plan has no state. The progress of a run is one integer, the number of global batches consumed.

Terms, used with these meanings in ``data/`` and ADR 1:

- row: the number of an image in the source, in [0, number of images).
- group: consecutive rows that are fast to read together, such as a Parquet row group.
- fragment: consecutive rows that an epoch reads as a whole: a group, or part of one in a weighted
  source.
- window: fragments whose images are shuffled together in memory.
- slot: the index of an image in the order of one epoch.
- item: a fixed number of images that a data worker reads, decodes and augments in one call.
- position: the index of an item in the whole run.
- step: the index of a global batch in the whole run; a batch is a fixed number of items.
- key: the number that seeds an image's views: its row, or a number beyond all rows if repeated.
- block: the arrays made from an item, one row per image.
- packing: how many steps' items Ray Data puts into one block (``run/ray_data.py``).

Images are shuffled in two stages, because some sources are only fast to read by group. First the
fragments are permuted and cut into windows that fit into memory; then the images of each window are
permuted. A source that fits into one window is shuffled fully. Memory grows with the number of
groups, not of images.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.data.fragments import Fragments, fragments_of, images_per_epoch
from raysl.data.permute import Indices, Permutation
from raysl.errors import ConfigError

# Second words of the Philox keys of the two stages; the keys of views have others.
_GROUPS, _WINDOWS = 1 << 62, (1 << 62) + (1 << 61)
_CACHE_SIZE = 4  # epochs and windows that are held at once
_ITEM_IMAGES, _ITEM_BYTES = 128, 96 << 20
_SMALL_ITEM_IMAGES, _SMALL_ITEM_BYTES = 1024, 8 << 20


class Item(NamedTuple):
    """The images of one position of the plan."""

    position: int  # index of the item in the run
    step: int  # global batch, counted from 0 over the whole run
    epoch: int
    indices: Indices  # rows of the source, ``(item_size,)``
    keys: Indices  # of the views, ``(item_size,)``: the row, or a number beyond all rows


class Plan:
    """The order in which a run reads its images.

    Args:
        group_sizes: Images in each group of the source, in the order of its rows.
        seed: The run's seed, 0 <= seed < 2**63.
        global_batch_size: Images of one optimizer step over all workers.
        item_size: Images of one item; divides the global batch.
        num_steps: Optimizer steps of the whole run.
        window_size: Largest number of images in a window, None for all; a larger group is a window
            of its own.
        weights: How often an epoch reads each image of a group; None means once.

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
        weights: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.group_sizes = np.asarray(group_sizes, dtype=np.int64)
        self.weights = weights
        self.num_images = images_per_epoch(self.group_sizes, weights)
        self._num_rows = int(self.group_sizes.sum())
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
        self._windows: dict[tuple[int, int], _Window] = {}
        self._lock = threading.Lock()  # several threads request items

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}, "_windows": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def with_item_size(self, item_size: int) -> "Plan":
        """Return the same order of images, in items of another size.

        Raises:
            ConfigError: If the item does not divide the global batch.
        """
        return Plan(
            self.group_sizes,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            item_size=item_size,
            num_steps=self.num_steps,
            window_size=self.window_size,
            weights=self.weights,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole global batches in one epoch; each epoch leaves out different images."""
        return self.num_images // self.global_batch_size

    @property
    def items_per_step(self) -> int:
        """Number of items in a global batch."""
        return self.global_batch_size // self.item_size

    @property
    def num_items(self) -> int:
        """Number of items in the whole run."""
        return self.num_steps * self.items_per_step

    def item(self, position: int) -> Item:
        """Return the item at a position in [0, num_items)."""
        step, item_in_step = divmod(position, self.items_per_step)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_size + item_in_step * self.item_size
        rows, repeats = self._rows(epoch, start, start + self.item_size)
        return Item(position, step, epoch, rows, rows + repeats * self._num_rows)

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Return the rows at slots [start, stop) of an epoch."""
        return self._rows(epoch, start, stop)[0]

    def _rows(self, epoch: int, start: int, stop: int) -> tuple[Indices, Indices]:
        with self._lock:
            bounds = self._layout(epoch).bounds
            number = int(np.searchsorted(bounds, start, side="right")) - 1
            pieces = []
            while start < stop:
                low, end = int(bounds[number]), min(stop, int(bounds[number + 1]))
                pieces.append(self._window(epoch, number).rows(start - low, end - low))
                start, number = end, number + 1
        rows, repeats = zip(*pieces, strict=True)
        return np.concatenate(rows), np.concatenate(repeats)

    def _layout(self, epoch: int) -> "_Layout":
        if epoch not in self._layouts:
            fragments = fragments_of(self.group_sizes, self.weights, seed=self.seed, epoch=epoch)
            rng = _stream(self.seed, _GROUPS + epoch, 0)
            order = rng.permutation(len(fragments.sizes)).astype(np.int32)
            ends = np.cumsum(fragments.sizes[order])
            cuts, num_before = [0], 0
            while cuts[-1] < len(ends):
                # A window holds all fragments that fit, but at least one.
                stop = int(np.searchsorted(ends, num_before + self.window_size, side="right"))
                cuts.append(max(stop, cuts[-1] + 1))
                num_before = int(ends[cuts[-1] - 1])
            bounds = np.array([0, *(int(ends[cut - 1]) for cut in cuts[1:])], dtype=np.int64)
            _add_to_cache(self._layouts, epoch, _Layout(fragments, order, np.array(cuts), bounds))
        return self._layouts[epoch]

    def _window(self, epoch: int, number: int) -> "_Window":
        key = (epoch, number)
        if key not in self._windows:
            layout = self._layout(epoch)
            fragments = layout.fragments.take(
                layout.order[slice(*layout.cuts[number : number + 2])]
            )
            rng = _stream(self.seed, _WINDOWS + epoch, number)
            _add_to_cache(self._windows, key, _Window(fragments, rng))
        return self._windows[key]


class _Layout(NamedTuple):
    """The fragments of an epoch, permuted and cut into windows."""

    fragments: Fragments
    order: npt.NDArray[np.int32]  # permuted indices of the fragments
    cuts: Indices  # window w holds order[cuts[w] : cuts[w + 1]]
    bounds: Indices  # window w covers slots [bounds[w], bounds[w + 1])


class _Window:
    """One window: fragments whose images are permuted together."""

    def __init__(self, fragments: Fragments, rng: np.random.Generator) -> None:
        self.fragments = fragments
        self.ends = np.cumsum(fragments.sizes)
        self.order = Permutation(rng, int(self.ends[-1]))

    def rows(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Return rows and repeats at indices [start, stop) of the shuffled window."""
        numbers = self.order[start:stop]
        fragment = np.searchsorted(self.ends, numbers, side="right")
        starts, sizes, repeats = self.fragments.take(fragment)
        return starts + numbers - self.ends[fragment] + sizes, repeats


def _stream(seed: int, stage: int, counter: int) -> np.random.Generator:
    key = np.array([seed, stage], dtype=np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], dtype=np.uint64))
    )


def _add_to_cache(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Add a value and drop the oldest one if the cache is full: items are read almost in order."""
    if len(cache) >= _CACHE_SIZE:
        del cache[next(iter(cache))]
    cache[key] = value


def item_size_for(batch_size_per_worker: int, *, bytes_per_image: int) -> int:
    """Return the largest divisor of a worker's batch that is a good item size.

    Each item costs a fixed 15 ms in Ray Data, so it holds up to 1,024 small images. It holds at
    most 128 large ones, because a block should stay below 128 MiB and because the first step waits
    for its items.

    Args:
        batch_size_per_worker: Images that a train worker takes in one step.
        bytes_per_image: Bytes of all views of one image.
    """
    size = max(1, bytes_per_image)
    large = min(_ITEM_IMAGES, _ITEM_BYTES // size)
    small = min(_SMALL_ITEM_IMAGES, _SMALL_ITEM_BYTES // size)
    most = max(1, large, small)
    return max(d for d in range(1, most + 1) if batch_size_per_worker % d == 0)
