"""Choose the rows that an epoch reads: every row once, or each row by its weight.

The terms are defined in ``plan.py``. A *span* is a run of neighbouring groups with equal weight; a
*pass* reads every row of a span once.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.data.permute import Indices

# Second word of the Philox keys of passes, distinct from those in ``plan.py``.
_PASSES = (1 << 62) + (1 << 60)
# A weighted span is cut into at least this many fragments, so that part of a pass is a fair sample
# of the span even if it has few groups.
_MIN_FRAGMENTS = 4096


class Fragments(NamedTuple):
    """Contiguous ranges of rows, read as a whole; every array is ``(num_fragments,)``."""

    starts: Indices  # first row
    sizes: Indices
    repeats: Indices  # 0 the first time a row occurs in an epoch, 1 the second time, ...

    def take(self, indices: npt.NDArray[np.integer[Any]]) -> "Fragments":
        """Return the fragments at these indices, in the given order."""
        return Fragments(self.starts[indices], self.sizes[indices], self.repeats[indices])


def images_per_epoch(group_sizes: Indices, weights: npt.NDArray[np.float64] | None) -> int:
    """Return the number of images in one epoch."""
    if weights is None:
        return int(np.sum(group_sizes))
    return sum(_images_read(group_sizes[span], weights[span]) for span in _spans(weights))


def fragments_of(
    group_sizes: Indices, weights: npt.NDArray[np.float64] | None, *, seed: int, epoch: int
) -> Fragments:
    """Return the fragments that an epoch reads, before ``plan.py`` shuffles them.

    A span with weight w and n images is an endless sequence of passes, each shuffled anew. An epoch
    reads the next round(w * n) images of that sequence, so that over many epochs every image of the
    span is read equally often.

    Args:
        group_sizes: Images in each group, ``(num_groups,)``, in the order of the rows.
        weights: How often an epoch reads each image of a group; None means once.
        seed: The run's seed.
        epoch: Number of the epoch, from 0.
    """
    starts = np.cumsum(group_sizes) - group_sizes
    if weights is None:
        zeros = np.broadcast_to(np.int64(0), group_sizes.shape)  # a view that takes no memory
        return Fragments(starts, group_sizes, zeros)
    pieces = []
    for number, span in enumerate(_spans(weights)):
        fragments = _cut(starts[span], group_sizes[span])
        rows, count = int(fragments.sizes.sum()), _images_read(group_sizes[span], weights[span])
        first, last = epoch * count, (epoch + 1) * count
        for repeat, pass_number in enumerate(range(first // rows, -(-last // rows))):
            key = np.array([seed, _PASSES + pass_number], dtype=np.uint64)
            counter = np.array([0, 0, 0, number], dtype=np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
            shuffled = fragments.take(rng.permutation(len(fragments.sizes)))
            offset = pass_number * rows
            low, high = max(0, first - offset), min(rows, last - offset)
            pieces.append(_between(shuffled, low, high, repeat))
    return Fragments(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _spans(weights: npt.NDArray[np.float64]) -> list[slice]:
    """Return the spans: runs of neighbouring groups with equal weight."""
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    return [slice(low, high) for low, high in itertools.pairwise(cuts)]


def _images_read(sizes: Indices, weights: npt.NDArray[np.float64]) -> int:
    """Return how many images of a span an epoch reads."""
    return max(1, round(float(weights[0]) * int(sizes.sum())))


def _cut(starts: Indices, sizes: Indices) -> Fragments:
    """Cut a span's groups into at least ``_MIN_FRAGMENTS`` fragments, or single images."""
    longest = max(1, int(sizes.sum()) // _MIN_FRAGMENTS)
    counts = -(-sizes // longest)
    group = np.repeat(np.arange(len(sizes)), counts)
    number_in_group = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = number_in_group * longest
    return Fragments(
        starts[group] + offsets,
        np.minimum(longest, sizes[group] - offsets),
        np.zeros(len(group), dtype=np.int64),
    )


def _between(fragments: Fragments, low: int, high: int, repeat: int) -> Fragments:
    """Return images [low, high) of a sequence of fragments, of which the ends may be cut."""
    ends = np.cumsum(fragments.sizes)
    begins = ends - fragments.sizes
    first, last = np.maximum(begins, low), np.minimum(ends, high)
    inside = last > first
    return Fragments(
        (fragments.starts + first - begins)[inside],
        (last - first)[inside],
        np.full(int(inside.sum()), repeat, dtype=np.int64),
    )
