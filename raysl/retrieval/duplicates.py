"""Find groups of near-duplicates: images connected by similarities above a threshold, exactly."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.retrieval.embeddings import Embeddings

Ints = npt.NDArray[np.int64]

_BLOCK_ROWS = 4096


class Duplicates(NamedTuple):
    """What belongs together."""

    groups: list[Ints]
    """Places of each group of two or more, ascending; groups in order of their first place."""
    nearest: npt.NDArray[np.float32]
    """``(M,)``: similarity of each image to its nearest other one; -1 if it is alone."""
    num_pairs: int
    """Pairs above the threshold."""


def find_duplicates(
    embeddings: Embeddings,
    *,
    threshold: float,
    device: torch.device,
    advance: Callable[[int], None] | None = None,
) -> Duplicates:
    """Group all images that chains of near-duplicates connect.

    Args:
        embeddings: M images.
        threshold: Two images are near-duplicates if their cosine similarity is at least this.
        device: Where the products are computed: M * M * D / 2 multiplications.
        advance: Called with the images that have been compared to all before them.
    """
    forest = Forest(len(embeddings))
    nearest = np.full(len(embeddings), -1.0, dtype=np.float32)
    num_pairs = 0
    for start, block in embeddings.blocks(_BLOCK_ROWS):
        rows = block.to(device)
        for other, columns in embeddings.blocks(_BLOCK_ROWS):
            if other > start:  # the pairs of the upper half are those of the lower
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


def _raise_to(values: npt.NDArray[np.float32], start: int, found: Tensor) -> None:
    part = values[start : start + len(found)]
    np.maximum(part, found.cpu().numpy(), out=part)


class Forest:
    """Disjoint sets of numbers; the smallest of a set stands for it.

    Many pairs are joined at a time: of a million pairs of one set, all but a few say nothing new.

    Args:
        count: Numbers, each alone at first.
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
            # Each root is hung below the smallest that asks for it; the others ask again.
            np.minimum.at(self._parent, high, low)

    def groups(self) -> list[Ints]:
        """Return the sets of two or more, ascending, in order of their smallest."""
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
    """Which images of a group are kept."""

    kept: npt.NDArray[np.bool_]
    """``(n,)``."""
    by: Ints
    """``(n,)``: which of the group, a kept one, stands for each; itself if it is kept."""
    similarity: npt.NDArray[np.float32]
    """``(n,)``, to that one."""


def choose(directions: Tensor, *, threshold: float) -> Choice:
    """Keep as few images of a group as stand for all: each dropped one is near a kept one.

    A group is connected by chains, and the ends of a chain may look nothing alike; so images are
    gone through in order, and one is kept unless a kept one is near enough.

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
