"""Draw the results of `raysl search` and `raysl duplicates`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.augment.crop import Image
from raysl.embed.embeddings import Embeddings
from raysl.embed.images import reopen_source, squares
from raysl.embed.search import Neighbors
from raysl.errors import DataError
from raysl.report.figure import BLUE, GREY, INK, RED, drawable_name
from raysl.report.image_grid import Cell, save_grid
from raysl.sources.source import Source

GRID_ROWS = 8
_GRID_COLUMNS = 10
_CELL_IN = 0.92
_MAX_NAME_LETTERS = 12


class GridImage(NamedTuple):
    """An image in a row of the picture, with its label and similarity."""

    image: Image  # (S, S, 3) uint8, all of one size
    label: str | None = None
    similarity: float | None = None
    """Similarity to the first image of its row."""
    note: str = ""
    """Text below an image without a label, such as its id."""


class SearchResult(NamedTuple):
    """Query images and their neighbours."""

    names: list[str]
    labels: list[str | None]
    neighbors: Neighbors
    source: Source
    """The source of the query images."""
    rows: list[int]
    """The row of each query in ``source``."""


def neighbors_of(neighbors: Neighbors, number: int) -> tuple[npt.NDArray[np.int64], list[float]]:
    """Return the positions and similarities of a query's neighbours, without empty entries."""
    positions = neighbors.positions[number].numpy()
    is_filled = positions >= 0
    return positions[is_filled], neighbors.similarities[number].numpy()[is_filled].tolist()


def draw_result(path: Path, embeddings: Embeddings, result: SearchResult) -> None:
    """Draw the first few queries with their neighbours.

    Raises:
        DataError: If the embedded source is missing or has changed, or the file cannot be written.
    """
    source = reopen_source(embeddings)
    count = min(GRID_ROWS, len(result.names))
    query_images = squares(result.source, result.rows[:count])
    rows = []
    for number in range(count):
        positions, similarities = neighbors_of(result.neighbors, number)
        positions = positions[:_GRID_COLUMNS]
        images = squares(source, embeddings.rows[positions].tolist())
        ids = embeddings.ids(positions)
        row = [GridImage(query_images[number], result.labels[number], note=result.names[number])]
        row += [
            GridImage(image, embeddings.label_name(int(position)), similarity, row_id)
            for image, position, similarity, row_id in zip(
                images, positions, similarities, ids, strict=False
            )
        ]
        rows.append(row)
    title = f"Nearest of {len(embeddings):,} images by cosine similarity"
    draw_neighbor_grid(path, rows, title=title)


def draw_neighbor_grid(path: Path, rows: Sequence[Sequence[GridImage]], *, title: str) -> None:
    """Draw a row for each query: the query, then its neighbours, the nearest first.

    The frame of a neighbour is blue if it has the query's class, dashed and red if it has another
    class, and grey if a label is missing.

    Args:
        path: PNG to write.
        rows: Rows of the picture, each a query and its neighbours.
        title: Title of the picture.

    Raises:
        DataError: If there is no row, or the file cannot be written.
    """
    cells = []
    for query, *others in rows:
        line = [Cell(query.image, (_short(query.label or query.note), "query"), INK)]
        line += [_neighbor_cell(query.label, other) for other in others]
        cells.append(line)
    _save(path, cells, title)


def draw_duplicate_sheet(path: Path, groups: Sequence[Sequence[GridImage]], *, title: str) -> None:
    """Draw a row for each group of duplicates: the kept image, then the others.

    Args:
        path: PNG to write.
        groups: Rows of the picture, each the kept image and its duplicates.
        title: Title of the picture.

    Raises:
        DataError: If there is no group, or the file cannot be written.
    """
    cells = []
    for kept, *others in groups:
        line = [Cell(kept.image, ("keep", _short(kept.note)), BLUE)]
        line += [
            Cell(other.image, (f"{other.similarity or 0.0:.4f}", _short(other.note)), GREY)
            for other in others
        ]
        cells.append(line)
    _save(path, cells, title)


def _neighbor_cell(query_label: str | None, neighbor: GridImage) -> Cell:
    similarity = f"{neighbor.similarity or 0.0:.3f}"
    if neighbor.label is None or query_label is None:
        return Cell(neighbor.image, (similarity, _short(neighbor.label or neighbor.note)), GREY)
    is_same = neighbor.label == query_label
    color = BLUE if is_same else RED
    return Cell(neighbor.image, (_short(neighbor.label), similarity), color, dashed=not is_same)


def _short(name: str) -> str:
    """Shorten a name at its start, since the end of a path or an id distinguishes images better."""
    short = name if len(name) <= _MAX_NAME_LETTERS else ".." + name[2 - _MAX_NAME_LETTERS :]
    return drawable_name(short, otherwise="") if short else ""


def _save(path: Path, cells: Sequence[Sequence[Cell]], title: str) -> None:
    if not cells:
        raise DataError(f"{path}: there is nothing to draw")
    try:
        save_grid(path, cells, cell_in=_CELL_IN, head=title)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
