"""Find groups of near-duplicates: images connected by similarities above a threshold, exactly."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.embed.embeddings import Embeddings

Ints = npt.NDArray[np.int64]

_BLOCK_ROWS = 4096


class Duplicates(NamedTuple):
    """Groups of near-duplicates."""

    groups: list[Ints]
    """Indices of each group of two or more, ascending; groups are sorted by their first index."""
    nearest: npt.NDArray[np.float32]
    """``(M,)``: similarity of each image to its nearest other image; -1 if there is none."""
    num_pairs: int
    """Number of pairs above the threshold."""


def find_duplicates(
    embeddings: Embeddings,
    *,
    threshold: float,
    device: torch.device,
    advance: Callable[[int], None] | None = None,
) -> Duplicates:
    """Group all images that are connected by chains of near-duplicates.

    Args:
        embeddings: M images.
        threshold: Two images are near-duplicates if their cosine similarity is at least this.
        device: Device of the matrix products: M * M * D / 2 multiplications.
        advance: Called with the number of images that were compared to all before them.
    """
    forest = Forest(len(embeddings))
    nearest = np.full(len(embeddings), -1.0, dtype=np.float32)
    num_pairs = 0
    for start, block in embeddings.blocks(_BLOCK_ROWS):
        rows = block.to(device)
        for other, columns in embeddings.blocks(_BLOCK_ROWS):
            if other > start:  # the matrix of similarities is symmetric
                break
            similarity = rows @ columns.to(device).T
            if other == start:
                similarity.fill_diagonal_(-1.0)
            _raise_to(nearest, start, similarity.amax(dim=1))
            _raise_to(nearest, other, similarity.amax(dim=0))
            if other == start:
                similarity.masked_fill_(torch.ones_like(similarity, dtype=torch.bool).triu(), -2.0)
            pairs = (similarity >= threshold).nonzero().cpu().numpy()
            num_pairs += len(pairs)
            forest.join(pairs[:, 0] + start, pairs[:, 1] + other)
        if advance is not None:
            advance(len(block))
    return Duplicates(forest.groups(), nearest, num_pairs)


def _raise_to(values: npt.NDArray[np.float32], start: int, similarity: Tensor) -> None:
    part = values[start : start + len(similarity)]
    np.maximum(part, similarity.cpu().numpy(), out=part)


class Forest:
    """Disjoint sets of numbers (union-find), each represented by its smallest member.

    Joins many pairs at a time: of a million pairs in one set, only a few carry information.

    Args:
        count: Number of elements, each initially its own set.
    """

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count, dtype=np.int64)

    def join(self, left: Ints, right: Ints) -> None:
        """Unite the sets of ``left[i]`` and ``right[i]`` for each i."""
        while True:
            a, b = self._roots(left), self._roots(right)
            differ = a != b
            if not differ.any():
                return
            left, right = left[differ], right[differ]
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            # Each root is attached to the smallest candidate; the other pairs are retried.
            np.minimum.at(self._parent, high, low)

    def groups(self) -> list[Ints]:
        """Return the sets of two or more, ascending, sorted by their smallest member."""
        roots = self._roots(np.arange(len(self._parent), dtype=np.int64))
        sizes = np.bincount(roots, minlength=len(roots))
        several = np.flatnonzero(sizes[roots] > 1)
        order = several[np.argsort(roots[several], kind="stable")]
        cuts = np.flatnonzero(np.diff(roots[order])) + 1
        return [part for part in np.split(order, cuts) if len(part)]

    def _roots(self, numbers: Ints) -> Ints:
        roots = self._parent[numbers]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                self._parent[numbers] = roots
                return roots
            roots = above


class Choice(NamedTuple):
    """The images of a group to keep, and those that they represent."""

    kept: npt.NDArray[np.bool_]
    """``(n,)``."""
    by: Ints
    """``(n,)``: the kept image that represents each one; itself if it is kept."""
    similarity: npt.NDArray[np.float32]
    """``(n,)``: similarity to that image."""


def choose(directions: Tensor, *, threshold: float) -> Choice:
    """Keep few images of a group, so that each dropped one is near a kept one.

    A group is connected by chains, and the ends of a chain may be dissimilar. So images are
    processed in order, and one is kept unless a kept one is near enough.

    Args:
        directions: ``(n, D)`` of unit length, in order of preference.
        threshold: Similarity that is near enough.
    """
    count = len(directions)
    kept = np.zeros(count, dtype=np.bool_)
    by = np.arange(count, dtype=np.int64)
    best = np.full(count, -np.inf, dtype=np.float32)
    for place in range(count):
        if best[place] >= threshold:
            continue
        similarity = (directions @ directions[place]).numpy()
        nearer = (similarity > best) & ~kept
        best[nearer], by[nearer] = similarity[nearer], place
        kept[place], by[place], best[place] = True, place, 1.0
    return Choice(kept, by, best)
