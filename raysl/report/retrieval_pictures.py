"""Pictures of what a search or a hunt for duplicates found."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raysl.augment.crop import Image
from raysl.errors import DataError
from raysl.report.figure import BLUE, GREY, INK, RED, drawable_name
from raysl.report.neighbour_grid import Cell, save_grid

_CELL_IN = 0.92
_NAME_LETTERS = 12


class Shown(NamedTuple):
    """An image of a picture, and what is known of it."""

    image: Image  # (S, S, 3) uint8, all of one size
    label: str | None = None
    similarity: float | None = None
    """To the first of its row."""
    note: str = ""


def draw_neighbor_grid(path: Path, rows: Sequence[Sequence[Shown]], *, title: str) -> None:
    """Draw queries at the left, each with its neighbours, the nearest first.

    A neighbour of the query's class has a blue frame, of another one a dashed red one, and a grey
    one where a label is missing.

    Args:
        path: PNG to write.
        rows: The query and its neighbours.
        title: Above all.

    Raises:
        DataError: If there is no row, or the file cannot be written.
    """
    cells = []
    for query, *others in rows:
        line = [Cell(query.image, (_short(query.label or query.note), "query"), INK)]
        line += [_neighbor(query.label, other) for other in others]
        cells.append(line)
    _save(path, cells, title)


def draw_duplicate_sheet(path: Path, groups: Sequence[Sequence[Shown]], *, title: str) -> None:
    """Draw a row for each group: at the left what is kept, then what is near it.

    Args:
        path: PNG to write.
        groups: The kept image, then the others.
        title: Above all.

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


def _neighbor(wanted: str | None, shown: Shown) -> Cell:
    similarity = f"{shown.similarity or 0.0:.3f}"
    if shown.label is None or wanted is None:
        return Cell(shown.image, (similarity, _short(shown.label or shown.note)), GREY)
    right = shown.label == wanted
    color = BLUE if right else RED
    return Cell(shown.image, (_short(shown.label), similarity), color, dashed=not right)


def _short(name: str) -> str:
    """Shorten a name from its beginning: of a path, and of a row of a shard, the end tells more."""
    end = name if len(name) <= _NAME_LETTERS else ".." + name[2 - _NAME_LETTERS :]
    return drawable_name(end, otherwise="") if end else ""


def _save(path: Path, cells: Sequence[Sequence[Cell]], title: str) -> None:
    if not cells:
        raise DataError(f"{path}: there is nothing to draw")
    try:
        save_grid(path, cells, cell_in=_CELL_IN, head=title)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
