"""Select the row groups, and the rows in them, that a Parquet source uses."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.errors import DataError
from raysl.sources.columns import Columns
from raysl.sources.footers import Footer, Ints
from raysl.sources.source import digest, spread_rows

# The rows taken under a limit come from at least this many row groups and files, if there are that
# many, because files may be sorted by class or by day.
_MIN_SPREAD = 16


class Groups(NamedTuple):
    """The row groups that hold kept rows, ordered by file.

    A row is kept if the filter and the limit select it. Each field is one array, which is compact
    even for a million groups.
    """

    file: npt.NDArray[np.int32]
    """Index of each group's file among the footers of :func:`collect_groups`, ``(num_groups,)``."""
    number: npt.NDArray[np.int32]
    """Index of each group in its file, ``(num_groups,)``."""
    rows: Ints
    """Number of kept rows in each group, ``(num_groups,)``."""
    places: npt.NDArray[np.int32] | None
    """Index within its row group of each kept row, ``(num_images,)``; None if all rows are kept."""
    firsts: Ints | None
    """Index within its file of each group's first row, kept or not, ``(num_groups,)``; None if all
    rows are kept."""
    num_bytes: int
    """Total bytes of the images in these row groups."""


class _Part(NamedTuple):
    """The row groups of one file that hold kept rows; fields as in :class:`Groups`.

    ``bytes`` is the size of the images of each group.
    """

    footer: Footer
    number: npt.NDArray[np.int32]
    rows: Ints
    firsts: Ints
    bytes: Ints
    places: npt.NDArray[np.int32] | None


def collect_groups(
    footers: Iterable[tuple[int, Footer]], limit: int | None
) -> tuple[list[Footer], Groups, str]:
    """Collect the row groups of all files, reduced to the kept rows.

    With a limit, reading stops once the files read hold that many rows and are enough to spread
    over. Then evenly spaced rows of evenly spaced row groups are taken.

    Args:
        footers: Footers, each with the index of its file, in the order of
            :func:`raysl.sources.source.reading_order`.
        limit: Number of rows to take; None for all.

    Returns:
        The footers that were read, ordered by file (only the first one read keeps its schema, to
        save memory); the selected row groups; and a fingerprint of the files and selected rows.

    Raises:
        DataError: If the files' columns differ.
    """
    numbered: list[tuple[int, _Part]] = []
    rows = files = 0
    for index, footer in footers:
        _check_alike(footer, numbered[0][1].footer if numbered else footer)
        part = _cut(footer if not numbered else footer._replace(schema=None))
        numbered.append((index, part))
        rows += int(part.rows.sum())
        files += len(part.rows) > 0
        if limit is not None and rows >= limit and files >= min(_MIN_SPREAD, limit):
            break
    parts = [part for _, part in sorted(numbered, key=lambda each: each[0])]
    read_footers = [part.footer for part in parts]
    groups = _join(parts, None if limit is None or limit >= rows else limit)
    chosen = b"" if groups.places is None else groups.places.tobytes() + groups.rows.tobytes()
    identities = (footer.identity for footer in read_footers)
    return read_footers, groups, digest(*identities, chosen)


def _cut(footer: Footer) -> _Part:
    """Reduce a file's row groups to those that hold kept rows."""
    ends = np.cumsum(footer.rows)
    starts = ends - footer.rows
    if footer.kept is None:
        rows, places = footer.rows, None
    else:
        group = np.searchsorted(ends, footer.kept, side="right")
        rows = np.bincount(group, minlength=len(ends)).astype(np.int64)
        places = (footer.kept - starts[group]).astype(np.int32)
    number = np.flatnonzero(rows).astype(np.int32)
    small_footer = footer._replace(bytes=footer.bytes[:0], kept=None)
    return _Part(small_footer, number, rows[number], starts[number], footer.bytes[number], places)


def _join(parts: list[_Part], limit: int | None) -> Groups:
    """Concatenate the row groups of all files, and cut them to the limit."""
    none = np.empty(0, np.int64)
    file = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.number) for part in parts])
    number = np.concatenate([none, *(part.number for part in parts)]).astype(np.int32)
    rows = np.concatenate([none, *(part.rows for part in parts)])
    firsts = np.concatenate([none, *(part.firsts for part in parts)])
    sizes = np.concatenate([none, *(part.bytes for part in parts)])
    filtered = [part.places for part in parts if part.places is not None]
    places = np.concatenate(filtered) if filtered else None
    if limit is not None:
        taken = _share_out(rows, limit)
        places = _take(rows, places, taken)
        used = np.flatnonzero(taken)
        file, number, rows = file[used], number[used], taken[used]
        firsts, sizes = firsts[used], sizes[used]
    return Groups(file, number, rows, places, None if places is None else firsts, int(sizes.sum()))


def _share_out(rows: Ints, limit: int) -> Ints:
    """Return how many rows to take of each row group, ``(num_groups,)``.

    Uses about as few row groups as can hold ``limit`` rows, but at least ``_MIN_SPREAD`` if there
    are that many.

    Args:
        rows: ``(num_groups,)``, all positive, more than ``limit`` in total.
        limit: Number of rows to take.
    """
    total = int(rows.sum())
    count = min(len(rows), max(_MIN_SPREAD, math.ceil(limit * len(rows) / total)), limit)
    while rows[used := spread_rows(len(rows), count)].sum() < limit:
        count = min(len(rows), count + 1 + count // 8)
    taken = np.zeros(len(rows), dtype=np.int64)
    num_left = limit
    # In ascending order of size, so that larger groups make up for smaller ones.
    for num_done, group in enumerate(used[np.argsort(rows[used], kind="stable")].tolist()):
        taken[group] = min(int(rows[group]), num_left // (len(used) - num_done))
        num_left -= int(taken[group])
    return taken


def _take(rows: Ints, places: npt.NDArray[np.int32] | None, taken: Ints) -> npt.NDArray[np.int32]:
    """Return, for evenly spaced kept rows, their index within their row group."""
    starts = np.cumsum(rows) - rows
    parts = []
    for group in np.flatnonzero(taken).tolist():
        selected = spread_rows(int(rows[group]), int(taken[group]))
        parts.append(selected if places is None else places[starts[group] + selected])
    return np.concatenate(parts).astype(np.int32)


def _check_alike(footer: Footer, first: Footer) -> None:
    ours, theirs = footer.columns, first.columns
    if ours[:4] != theirs[:4]:
        mine, others = _describe(ours), _describe(theirs)
    # A program that rewrites a file may drop the class names; names that exist must agree.
    elif ours.class_names == theirs.class_names or not (ours.class_names and theirs.class_names):
        return
    else:
        mine = f"the classes of {ours.label!r} have other names (ClassLabel)"
        others = f"{len(theirs.class_names)} names, the first is {theirs.class_names[0]!r}"
    raise DataError(
        f"{footer.path}: {mine}; unlike {first.path}: {others}. Files of one source have the same "
        f"columns: give a folder, or a glob such as DIR/train-*.parquet, with files of one kind"
    )


def _describe(columns: Columns) -> str:
    kind = "paths of images" if columns.paths == columns.image else "images"
    where = " in the folders' names" if columns.label_in_path else ""
    return f"{kind} in {columns.image!r}, labels in {columns.label!r}{where}"
