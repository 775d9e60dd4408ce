"""Search exact nearest neighbours by cosine similarity, block by block, at any scale."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from raysl.embed.embeddings import Embeddings
from raysl.errors import ShapeError

# Similarities are computed for this many rows and queries at a time: a block takes 200 MiB,
# as (Q, B) float32 similarities and int64 keys.
_BLOCK_ROWS = 4096
_BLOCK_QUERIES = 4096
_MAGNITUDE_BITS = 0x7FFFFFFF  # all bits of a float32 but the sign
_LOW_HALF = 0xFFFFFFFF  # of an int64 key


class Neighbors(NamedTuple):
    """The nearest neighbours of each query, nearest first; ties are sorted by position.

    A query has fewer than k neighbours if there are fewer images; the last entries are then empty.
    """

    similarities: Tensor
    """``(Q, k)`` float32 in [-1, 1]; -inf where there is no neighbour."""
    positions: Tensor
    """``(Q, k)`` int64 positions among the embeddings; -1 where there is no neighbour."""


def nearest(
    queries: Tensor,
    blocks: Iterable[tuple[int, Tensor]],
    *,
    k: int,
    own_positions: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Neighbors:
    """Return the k nearest neighbours of each query among the rows of all blocks.

    Args:
        queries: ``(Q, D)`` of unit length.
        blocks: Position of the first row and ``(B, D)`` rows of unit length, in ascending order;
            they are moved to the queries' device.
        k: Number of neighbours, > 0.
        own_positions: ``(Q,)`` positions of the queries themselves, which are excluded; None if
            they are not among the rows.
        advance: Called with the number of rows of each finished block.

    Raises:
        ShapeError: If the widths differ.
    """
    device, count = queries.device, len(queries)
    best = torch.full((count, k), float("-inf"), device=device)
    positions = torch.full((count, k), -1, dtype=torch.int64, device=device)
    for start, block in blocks:
        if block.shape[1] != queries.shape[1]:
            raise ShapeError(
                f"queries have {queries.shape[1]} features, the embeddings {block.shape[1]}"
            )
        similarity = (queries @ block.to(device).T).clamp_(-1.0, 1.0)
        if own_positions is not None:
            own_columns = own_positions - start
            in_block = ((own_columns >= 0) & (own_columns < len(block))).nonzero().squeeze(1)
            similarity[in_block, own_columns[in_block]] = float("-inf")
        values, columns = _top(similarity, min(k, len(block)))
        # Earlier rows come first, and a stable sort keeps them first among ties.
        candidates = torch.cat([best, values], dim=1)
        order = candidates.argsort(dim=1, descending=True, stable=True)[:, :k]
        best = candidates.gather(1, order)
        positions = torch.cat([positions, columns + start], dim=1).gather(1, order)
        if advance is not None:
            advance(len(block))
    return Neighbors(best, positions.masked_fill(best == float("-inf"), -1))


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row and their columns, ties sorted by column.

    `topk` alone does not guarantee the order of ties. So it sorts int64 keys: the upper half is an
    integer ordered like the float (the bits of a negative float, but its sign, are inverted); the
    lower half decreases with the column.
    """
    bits = (similarity + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: no negative zero
    ordered = torch.where(bits < 0, bits ^ _MAGNITUDE_BITS, bits)
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    keys = (ordered << 32) | (_LOW_HALF - columns)
    chosen = _LOW_HALF - (keys.topk(k, dim=1).values & _LOW_HALF)
    return similarity.gather(1, chosen), chosen


def neighbors_of_all(
    embeddings: Embeddings,
    *,
    k: int,
    device: torch.device,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Neighbors]]:
    """Yield the neighbours of every image among the other images, block by block.

    Args:
        embeddings: M images.
        k: Number of neighbours, > 0.
        device: Device of the matrix products, which take M * M * D multiplications.
        advance: Called with the number of images of each finished block.

    Yields:
        Position of the first image of a block, and the neighbours of the block's images, on the
        CPU.
    """
    for start, block in embeddings.blocks(_BLOCK_QUERIES):
        own = torch.arange(start, start + len(block), device=device)
        neighbors = nearest(
            block.to(device), embeddings.blocks(_BLOCK_ROWS), k=k, own_positions=own
        )
        yield start, Neighbors(neighbors.similarities.cpu(), neighbors.positions.cpu())
        if advance is not None:
            advance(len(block))


def search(
    embeddings: Embeddings,
    queries: Tensor,
    *,
    k: int,
    device: torch.device,
    own_positions: Tensor | None = None,
) -> Neighbors:
    """Return the nearest images of each query, on the CPU.

    Args:
        embeddings: The images to search.
        queries: ``(Q, D)`` of unit length.
        k: Number of neighbours, > 0.
        device: Device of the matrix products.
        own_positions: ``(Q,)`` positions of the queries themselves, which are excluded; None if
            they are not among the images.
    """
    parts = [
        nearest(
            queries[start : start + _BLOCK_QUERIES].to(device),
            embeddings.blocks(_BLOCK_ROWS),
            k=k,
            own_positions=None
            if own_positions is None
            else own_positions[start : start + _BLOCK_QUERIES].to(device),
        )
        for start in range(0, len(queries), _BLOCK_QUERIES)
    ]
    return Neighbors(
        torch.cat([part.similarities.cpu() for part in parts]),
        torch.cat([part.positions.cpu() for part in parts]),
    )
