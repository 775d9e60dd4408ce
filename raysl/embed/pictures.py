"""Draw the results of a search for neighbours or duplicates."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raysl.augment.crop import Image
from raysl.errors import DataError
from raysl.report.figure import BLUE, GREY, INK, RED, drawable_name
from raysl.report.image_grid import Cell, save_grid

_CELL_IN = 0.92
_NAME_LETTERS = 12


class GridImage(NamedTuple):
    """An image of a row, with its label and similarity."""

    image: Image  # (S, S, 3) uint8, all of one size
    label: str | None = None
    similarity: float | None = None
    """Similarity to the first image of its row."""
    note: str = ""


def draw_neighbor_grid(path: Path, rows: Sequence[Sequence[GridImage]], *, title: str) -> None:
    """Draw queries at the left, each followed by its neighbours, the nearest first.

    A neighbour of the query's class has a blue frame, one of another class a dashed red one, and a
    grey one if a label is missing.

    Args:
        path: PNG to write.
        rows: Each is a query and its neighbours.
        title: Title of the picture.

    Raises:
        DataError: If there is no row, or the file cannot be written.
    """
    cells = []
    for query, *others in rows:
        line = [Cell(query.image, (_short(query.label or query.note), "query"), INK)]
        line += [_neighbor(query.label, other) for other in others]
        cells.append(line)
    _save(path, cells, title)


def draw_duplicate_sheet(path: Path, groups: Sequence[Sequence[GridImage]], *, title: str) -> None:
    """Draw a row for each group of duplicates: the kept image, then the others.

    Args:
        path: PNG to write.
        groups: Each is the kept image, then the others.
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


def _neighbor(wanted: str | None, shown: GridImage) -> Cell:
    similarity = f"{shown.similarity or 0.0:.3f}"
    if shown.label is None or wanted is None:
        return Cell(shown.image, (similarity, _short(shown.label or shown.note)), GREY)
    right = shown.label == wanted
    color = BLUE if right else RED
    return Cell(shown.image, (_short(shown.label), similarity), color, dashed=not right)


def _short(name: str) -> str:
    """Shorten a name at its start: the end of a path, or of a row in a shard, says more."""
    end = name if len(name) <= _NAME_LETTERS else ".." + name[2 - _NAME_LETTERS :]
    return drawable_name(end, otherwise="") if end else ""


def _save(path: Path, cells: Sequence[Sequence[Cell]], title: str) -> None:
    if not cells:
        raise DataError(f"{path}: there is nothing to draw")
    try:
        save_grid(path, cells, cell_in=_CELL_IN, head=title)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
