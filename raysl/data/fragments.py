"""Which rows an epoch reads: ranges of rows, all once, or as often as weights say."""

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.data.permute import Indices

# Second word of the Philox keys of passes; the plan's own stages have others.
_PASSES = (1 << 62) + (1 << 60)
# A weighted source of few groups is cut so that a part of a pass is a sample of all of it.
_FEWEST_PIECES = 4096


class Fragments(NamedTuple):
    """Ranges of rows that are quick to read as a whole, each ``(num_fragments,)``."""

    starts: Indices  # first row
    sizes: Indices
    repeats: Indices  # 0 where a row comes up first in an epoch, 1 where it does again, ...

    def take(self, which: npt.NDArray[np.integer[Any]]) -> "Fragments":
        """Return some of them, in that order."""
        return Fragments(self.starts[which], self.sizes[which], self.repeats[which])


def images_per_epoch(group_sizes: Indices, weights: npt.NDArray[np.float64] | None) -> int:
    """Return the number of images in one pass over weighted groups."""
    if weights is None:
        return int(np.sum(group_sizes))
    return sum(_share(group_sizes[part], weights[part]) for part in _parts(weights))


def fragments_of(
    group_sizes: Indices, weights: npt.NDArray[np.float64] | None, *, seed: int, epoch: int
) -> Fragments:
    """Return what an epoch reads.

    Groups that follow each other with one weight w, n images, are read in passes without end, each
    in an order of its own; an epoch takes round(w * n) images and the next one goes on from there.
    So every image comes up equally often whatever w is.

    Args:
        group_sizes: Images in each group, in the order of the rows.
        weights: How often an image of each group is seen in an epoch; None for once.
        seed: The run's seed.
        epoch: Pass over the images.
    """
    starts = np.cumsum(group_sizes) - group_sizes
    if weights is None:
        none = np.broadcast_to(np.int64(0), group_sizes.shape)  # takes no memory
        return Fragments(starts, group_sizes, none)
    found = []
    for number, part in enumerate(_parts(weights)):
        pieces = _pieces(starts[part], group_sizes[part])
        rows, share = int(pieces.sizes.sum()), _share(group_sizes[part], weights[part])
        first, last = epoch * share, (epoch + 1) * share
        for repeat, turn in enumerate(range(first // rows, -(-last // rows))):
            key = np.array([seed, _PASSES + turn], dtype=np.uint64)
            counter = np.array([0, 0, 0, number], dtype=np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
            shuffled = pieces.take(rng.permutation(len(pieces.sizes)))
            low, high = max(0, first - turn * rows), min(rows, last - turn * rows)
            found.append(_between(shuffled, low, high, repeat))
    return Fragments(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _parts(weights: npt.NDArray[np.float64]) -> list[slice]:
    """Return the runs of groups that have one weight."""
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    return [slice(low, high) for low, high in itertools.pairwise(cuts)]


def _share(sizes: Indices, weights: npt.NDArray[np.float64]) -> int:
    return max(1, round(float(weights[0]) * int(sizes.sum())))


def _pieces(starts: Indices, sizes: Indices) -> Fragments:
    """Cut the groups of a part into at least some thousand pieces, or into single images."""
    longest = max(1, int(sizes.sum()) // _FEWEST_PIECES)
    counts = -(-sizes // longest)
    group = np.repeat(np.arange(len(sizes)), counts)
    place = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = place * longest
    return Fragments(
        starts[group] + offsets,
        np.minimum(longest, sizes[group] - offsets),
        np.zeros(len(group), dtype=np.int64),
    )


def _between(pieces: Fragments, low: int, high: int, repeat: int) -> Fragments:
    """Return the images [low, high) of the pieces' sequence; the first and last may be cut."""
    ends = np.cumsum(pieces.sizes)
    begins = ends - pieces.sizes
    first, last = np.maximum(begins, low), np.minimum(ends, high)
    inside = last > first
    return Fragments(
        (pieces.starts + first - begins)[inside],
        (last - first)[inside],
        np.full(int(inside.sum()), repeat, dtype=np.int64),
    )
