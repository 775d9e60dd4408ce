"""Search exact nearest neighbours by cosine similarity, block by block, at any scale."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from raysl.embed.embeddings import Embeddings
from raysl.errors import ShapeError

# Similarities computed at a time, (Q, B) float32 and int64 keys: 200 MiB.
_BLOCK_ROWS = 4096
_QUERIES = 4096
_SIGN = 0x7FFFFFFF
_LOW = 0xFFFFFFFF


class Neighbors(NamedTuple):
    """The nearest neighbours of each query, nearest first; ties are sorted by index."""

    similarities: Tensor
    """``(Q, k)`` float32 in [-1, 1]; -inf if there are fewer than k."""
    places: Tensor
    """``(Q, k)`` int64 indices; -1 if there are fewer."""


def nearest(
    queries: Tensor,
    blocks: Iterable[tuple[int, Tensor]],
    *,
    k: int,
    own_places: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Neighbors:
    """Return the k nearest rows of all blocks for each query.

    Args:
        queries: ``(Q, D)`` of unit length.
        blocks: Index of the first row and ``(B, D)`` of unit length, in ascending order; they are
            moved to the queries' device.
        k: > 0.
        own_places: ``(Q,)`` indices of the queries themselves, which are excluded.
        advance: Called with the number of rows of each finished block.

    Raises:
        ShapeError: If the widths differ.
    """
    device, count = queries.device, len(queries)
    best = torch.full((count, k), float("-inf"), device=device)
    places = torch.full((count, k), -1, dtype=torch.int64, device=device)
    for start, block in blocks:
        if block.shape[1] != queries.shape[1]:
            raise ShapeError(
                f"queries have {queries.shape[1]} features, the embeddings {block.shape[1]}"
            )
        similarity = (queries @ block.to(device).T).clamp_(-1.0, 1.0)
        if own_places is not None:
            inner = own_places - start
            here = ((inner >= 0) & (inner < len(block))).nonzero().squeeze(1)
            similarity[here, inner[here]] = float("-inf")
        values, columns = _top(similarity, min(k, len(block)))
        # Earlier rows come first, and a stable sort keeps them first among ties.
        both = torch.cat([best, values], dim=1)
        order = both.argsort(dim=1, descending=True, stable=True)[:, :k]
        best = both.gather(1, order)
        places = torch.cat([places, columns + start], dim=1).gather(1, order)
        if advance is not None:
            advance(len(block))
    return Neighbors(best, places.masked_fill(best == float("-inf"), -1))


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row, ties sorted by column, which `topk` does not guarantee.

    The keys are integers ordered like the floats, with the column in the lower half.
    """
    bits = (similarity + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: no negative zero
    ordered = torch.where(bits < 0, bits ^ _SIGN, bits)
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    keys = (ordered << 32) | (_LOW - columns)
    chosen = _LOW - (keys.topk(k, dim=1).values & _LOW)
    return similarity.gather(1, chosen), chosen


def neighbors_of_all(
    embeddings: Embeddings,
    *,
    k: int,
    device: torch.device,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Neighbors]]:
    """Yield the neighbours of all images among the others, a block of images at a time.

    Args:
        embeddings: M images.
        k: > 0.
        device: Device of the matrix products: M * M * D multiplications.
        advance: Called with the number of finished images.

    Yields:
        Index of the first image of a block, and the block's neighbours on the CPU.
    """
    for start, block in embeddings.blocks(_QUERIES):
        own = torch.arange(start, start + len(block), device=device)
        neighbors = nearest(block.to(device), embeddings.blocks(_BLOCK_ROWS), k=k, own_places=own)
        yield start, Neighbors(neighbors.similarities.cpu(), neighbors.places.cpu())
        if advance is not None:
            advance(len(block))


def search(
    embeddings: Embeddings,
    queries: Tensor,
    *,
    k: int,
    device: torch.device,
    own_places: Tensor | None = None,
) -> Neighbors:
    """Return the nearest images of some queries, on the CPU.

    Args:
        embeddings: The images to search.
        queries: ``(Q, D)`` of unit length.
        k: > 0.
        device: Device of the matrix products.
        own_places: As for :func:`nearest`.
    """
    parts = [
        nearest(
            queries[at : at + _QUERIES].to(device),
            embeddings.blocks(_BLOCK_ROWS),
            k=k,
            own_places=None if own_places is None else own_places[at : at + _QUERIES].to(device),
        )
        for at in range(0, len(queries), _QUERIES)
    ]
    return Neighbors(
        torch.cat([part.similarities.cpu() for part in parts]),
        torch.cat([part.places.cpu() for part in parts]),
    )
