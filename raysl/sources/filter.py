"""Select the rows of a source by their columns, paths and sizes."""

import fnmatch
import re
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raysl.errors import DataError
from raysl.sources.storage import read_file, resolve

Scalar = bool | int | float | str
Comparison = Literal[
    "==", "!=", "<", "<=", ">", ">=", "in", "not in", "matches", "in file", "not in file"
]
Condition = tuple[str, Comparison, Scalar | tuple[Scalar, ...]]
"""[column, comparison, value]; ``in`` and ``not in`` take a list, ``in file`` and ``not in file``
the name of a text file of one value a line, ``matches`` a pattern with * and ? for strings. A row
without a value in the column never matches."""

_COMPARE = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def columns_of(conditions: Sequence[Condition]) -> list[str]:
    """Return the columns that the conditions read, without duplicates."""
    return list(dict.fromkeys(column for column, _, _ in conditions))


def is_list_file(comparison: str) -> bool:
    """Return whether a condition's value is the name of a file of values."""
    return comparison in ("in file", "not in file")


def describe_filter(conditions: Sequence[Condition]) -> list[Any]:
    """Describe a filter so that any change shows; list files count by content, not by name."""
    return [
        [column, comparison, "\n".join(_read_lines(str(value)))]
        if is_list_file(comparison)
        else [column, comparison, value]
        for column, comparison, value in conditions
    ]


class RowFilter:
    """The conditions of a source, applied part by part: by file or by shard.

    It records which lines of list files matched a row: otherwise a list that matches nothing would
    go unnoticed. Thread-safe.

    Args:
        conditions: A row must fulfil all of them.
        where: Name of the source for error messages.

    Raises:
        DataError: If a list file cannot be read, or is an empty list of rows to keep.
    """

    def __init__(self, conditions: Sequence[Condition], *, where: str) -> None:
        self.conditions = tuple(conditions)
        self._where = where
        self._lists = {c: _List(c, where=where) for c in self.conditions if is_list_file(c[1])}
        self._lock = threading.Lock()
        self._rows, self._kept = 0, 0

    def keep(self, table: pa.Table, *, where: str | None = None) -> npt.NDArray[np.bool_]:
        """Return which rows of a table fulfil all conditions, ``(num_rows,)``.

        Args:
            table: Has at least the columns that the conditions read.
            where: Name of the table for the error message.

        Raises:
            DataError: If a column is missing or cannot be compared with the value.
        """
        kept = np.ones(table.num_rows, dtype=np.bool_)
        for condition in self.conditions:
            kept &= self._keep_one(table, condition, where or self._where)
        with self._lock:
            self._rows += len(kept)
            self._kept += int(kept.sum())
        return kept

    def notes(self) -> tuple[str, ...]:
        """Return notes for the whole filtered source, such as unmatched lines of list files."""
        lines = [note for each in self._lists.values() if (note := each.note())]
        if out := self._rows - self._kept:
            lines.insert(0, f"{out:,} of {self._rows:,} images are left out by data.filter")
        return tuple(lines)

    def nothing_left(self) -> DataError:
        """Return the error to raise if no row is kept."""
        why = "; ".join(note for each in self._lists.values() if (note := each.note()))
        return DataError(
            f"{self._where}: data.filter leaves no image" + (f": {why}" if why else "")
        )

    def _keep_one(self, table: pa.Table, condition: Condition, where: str) -> npt.NDArray[np.bool_]:
        column, comparison, value = condition
        setting = f"data.filter {list(condition)}"
        if column not in table.column_names:
            raise DataError(
                f"{where}: {setting}: no column {column!r}; there are "
                f"{', '.join(table.column_names) or 'none'}"
            )
        try:
            if condition in self._lists:
                return self._listed(self._lists[condition], table.column(column))
            return _holds(table.column(column), comparison, value)
        except (pa.ArrowException, TypeError, ValueError) as error:
            kind = table.schema.field(column).type
            raise DataError(
                f"{where}: {setting}: the column holds {kind}, which does not compare: {error}"
            ) from None

    def _listed(self, listed: "_List", column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Return which rows have a value that the file lists, or for ``not in file`` does not."""
        lines = listed.lines.cast(column.type)
        is_listed = pc.is_in(column, value_set=lines)
        with self._lock:
            listed.take(lines, column)
        kept = pc.and_(is_listed if listed.wanted else pc.invert(is_listed), pc.is_valid(column))
        return np.asarray(kept.to_numpy(zero_copy_only=False), dtype=np.bool_)


class _List:
    """The lines of a list file, and which of them matched a row."""

    def __init__(self, condition: Condition, *, where: str) -> None:
        self.column, self.comparison, self.path = condition[0], condition[1], str(condition[2])
        self.wanted = self.comparison == "in file"
        setting = f"{where}: data.filter {list(condition)}"
        try:
            self.lines = pa.array(_read_lines(self.path), pa.string())
        except DataError as error:
            raise DataError(f"{setting}: {error}; give a text file of one value a line") from None
        if self.wanted and not len(self.lines):
            raise DataError(f"{setting}: the file has no line, so that no image would be left")
        self._matched = np.zeros(len(self.lines), dtype=np.bool_)
        self._example: str | None = None

    def take(self, lines: pa.Array, column: pa.ChunkedArray) -> None:
        """Record the lines, cast to the column's type, that occur in the column."""
        if not self._matched.all():
            self._matched |= pc.is_in(lines, value_set=column.combine_chunks()).to_numpy(
                zero_copy_only=False
            )
        if self._example is None and len(column):
            self._example = str(column[0].as_py())

    def note(self) -> str:
        """Describe the lines that matched no row; "" if all did."""
        total, missed = len(self.lines), np.flatnonzero(~self._matched)
        if not total:
            return f"0 lines are in {self.path}: data.filter {self.comparison!r} drops nothing"
        if not len(missed):
            return ""
        line = self.lines[int(missed[0])].as_py()
        several = len(missed) > 1
        if len(missed) == total:
            what = (
                f"none of the {total:,} lines of {self.path} is"
                if total > 1
                else (f"the line of {self.path} is not")
            )
            like = f"; they look like {line!r}" if several else f": {line!r}"
            here = "" if self._example is None else f", the images' own like {self._example!r}"
            return f"{what} a {self.column} of this source{like}{here}"
        verb = "are" if several else "is"
        return (
            f"{len(missed):,} of the {total:,} lines of {self.path} {verb} no {self.column} of "
            + (f"this source, such as {line!r}")
        )


def _read_lines(path: str) -> list[str]:
    """Return the distinct non-empty lines of a text file, in order."""
    text = read_file(*resolve(path)).decode("utf-8-sig", errors="backslashreplace")
    return list(dict.fromkeys(line for line in re.split(r"\r?\n", text) if line))


def _holds(column: pa.ChunkedArray, comparison: str, value: Any) -> npt.NDArray[np.bool_]:
    if comparison == "matches":
        texts = column.cast(pa.string()).to_pylist()
        return np.array(
            [t is not None and fnmatch.fnmatchcase(t, str(value)) for t in texts], dtype=np.bool_
        )
    if comparison in ("in", "not in"):
        if not isinstance(value, tuple):
            raise TypeError(f"{comparison!r} takes a list of values")
        result = pc.is_in(column, value_set=pa.array(value))
        if comparison == "not in":
            result = pc.and_(pc.invert(result), pc.is_valid(column))
    else:
        if isinstance(value, tuple):
            raise TypeError(f"{comparison!r} takes one value; a list goes with 'in'")
        result = _COMPARE[comparison](column, pa.scalar(value))
    return np.asarray(pc.fill_null(result, False).to_numpy(zero_copy_only=False), dtype=np.bool_)
