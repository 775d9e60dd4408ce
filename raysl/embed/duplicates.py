"""Find groups of near-duplicates, images connected by high similarities, by exact search."""

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
    """Positions of each group of two or more, ascending; groups are sorted by their first one."""
    nearest: npt.NDArray[np.float32]
    """``(M,)``: similarity of each image to its nearest other image; -1 if there is none."""
    num_pairs: int
    """Number of pairs whose similarity is at least the threshold."""


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
        device: Device of the matrix products, which take M * M * D / 2 multiplications.
        advance: Called with the number of images of each block that has been compared with itself
            and all earlier blocks.
    """
    forest = Forest(len(embeddings))
    nearest = np.full(len(embeddings), -1.0, dtype=np.float32)
    num_pairs = 0
    for start, block in embeddings.blocks(_BLOCK_ROWS):
        rows = block.to(device)
        for other, columns in embeddings.blocks(_BLOCK_ROWS):
            if other > start:  # the matrix of similarities is symmetric: its lower half is enough
                break
            similarity = rows @ columns.to(device).T
            if other == start:
                similarity.fill_diagonal_(-1.0)  # an image is not its own neighbour
            _update_maximum(nearest, start, similarity.amax(dim=1))
            _update_maximum(nearest, other, similarity.amax(dim=0))
            if other == start:  # count each pair once
                similarity.masked_fill_(torch.ones_like(similarity, dtype=torch.bool).triu(), -2.0)
            pairs = (similarity >= threshold).nonzero().cpu().numpy()
            num_pairs += len(pairs)
            forest.join(pairs[:, 0] + start, pairs[:, 1] + other)
        if advance is not None:
            advance(len(block))
    return Duplicates(forest.groups(), nearest, num_pairs)


def _update_maximum(values: npt.NDArray[np.float32], start: int, similarity: Tensor) -> None:
    part = values[start : start + len(similarity)]
    np.maximum(part, similarity.cpu().numpy(), out=part)


class Forest:
    """Disjoint sets of numbers (union-find), each represented by its smallest member.

    Many pairs are joined at a time: of a million pairs in one set, most join what is one set
    already.

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
    """Which images of a group to keep, and which kept image represents each one."""

    kept: npt.NDArray[np.bool_]
    """``(n,)``: whether each image is kept."""
    by: Ints
    """``(n,)``: index of the kept image that represents each one; its own if it is kept."""
    similarity: npt.NDArray[np.float32]
    """``(n,)``: similarity to the image that represents it; 1 if it is kept."""


def choose(directions: Tensor, *, threshold: float) -> Choice:
    """Keep few images of a group, so that each dropped one is near a kept one.

    A group is connected by chains, and the ends of a chain may be dissimilar. So images are
    processed in order, and an image is kept unless one that is kept already is near enough.

    Args:
        directions: ``(n, D)`` of unit length, in order of preference.
        threshold: Smallest similarity that is near enough.
    """
    count = len(directions)
    kept = np.zeros(count, dtype=np.bool_)
    by = np.arange(count, dtype=np.int64)
    best = np.full(count, -np.inf, dtype=np.float32)
    for index in range(count):
        if best[index] >= threshold:
            continue
        similarity = (directions @ directions[index]).numpy()
        nearer = (similarity > best) & ~kept
        best[nearer], by[nearer] = similarity[nearer], index
        kept[index], by[index], best[index] = True, index, 1.0
    return Choice(kept, by, best)
