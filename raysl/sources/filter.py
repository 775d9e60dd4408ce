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
the name of a text file with one value per line, ``matches`` a pattern with * and ? for strings. A
row without a value in the column never matches."""

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
    """Describe a filter so that any change shows; list files by their content, not their name."""
    return [
        [column, comparison, "\n".join(_read_lines(str(value)))]
        if is_list_file(comparison)
        else [column, comparison, value]
        for column, comparison, value in conditions
    ]


class RowFilter:
    """The conditions of a source, applied to one file or shard at a time. Thread-safe.

    It records which lines of list files matched a row, to report a list that matches nothing.

    Args:
        conditions: A row must fulfil all of them.
        where: Name of the source for error messages.
        key: The setting that gives the conditions, for messages.

    Raises:
        DataError: If a list file cannot be read, or is an empty list of rows to keep.
    """

    def __init__(
        self, conditions: Sequence[Condition], *, where: str, key: str = "data.filter"
    ) -> None:
        self.conditions = tuple(conditions)
        self._where, self._key = where, key
        self._lists = {
            c: _List(c, where=where, key=key) for c in self.conditions if is_list_file(c[1])
        }
        self._lock = threading.Lock()
        self._num_rows, self._num_selected = 0, 0

    def keep(self, table: pa.Table, *, where: str | None = None) -> npt.NDArray[np.bool_]:
        """Return which rows of a table fulfil all conditions, ``(num_rows,)``.

        Args:
            table: Table with at least the columns that the conditions read.
            where: Name of the table for the error message; defaults to the source's name.

        Raises:
            DataError: If a column is missing or cannot be compared with the value.
        """
        selected = np.ones(table.num_rows, dtype=np.bool_)
        for condition in self.conditions:
            selected &= self._fulfils(table, condition, where or self._where)
        with self._lock:
            self._num_rows += len(selected)
            self._num_selected += int(selected.sum())
        return selected

    def notes(self) -> tuple[str, ...]:
        """Return notes on the whole source: dropped images, unmatched lines of list files."""
        lines = [note for each in self._lists.values() if (note := each.note())]
        if num_dropped := self._num_rows - self._num_selected:
            lines.insert(
                0, f"{num_dropped:,} of {self._num_rows:,} images are left out by {self._key}"
            )
        return tuple(lines)

    def nothing_left(self) -> DataError:
        """Build the error for a filter that selects no row."""
        why = "; ".join(note for each in self._lists.values() if (note := each.note()))
        return DataError(
            f"{self._where}: {self._key} leaves no image" + (f": {why}" if why else "")
        )

    def _fulfils(self, table: pa.Table, condition: Condition, where: str) -> npt.NDArray[np.bool_]:
        column, comparison, value = condition
        setting = f"{self._key} {list(condition)}"
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
        """Return which rows have a value that the file lists, or for ``not in file`` lacks."""
        lines = listed.lines.cast(column.type)
        is_listed = pc.is_in(column, value_set=lines)
        with self._lock:
            listed.record_matches(lines, column)
        selected = pc.and_(is_listed if listed.keeps else pc.invert(is_listed), pc.is_valid(column))
        return np.asarray(selected.to_numpy(zero_copy_only=False), dtype=np.bool_)


class _List:
    """The lines of a list file, and which of them matched a row."""

    def __init__(self, condition: Condition, *, where: str, key: str) -> None:
        self.column, self.comparison, self.path = condition[0], condition[1], str(condition[2])
        self.key, self.keeps = key, self.comparison == "in file"
        setting = f"{where}: {key} {list(condition)}"
        try:
            self.lines = pa.array(_read_lines(self.path), pa.string())
        except DataError as error:
            raise DataError(
                f"{setting}: {error}; give a text file with one value per line"
            ) from None
        if self.keeps and not len(self.lines):
            raise DataError(f"{setting}: the file has no lines, so no image would be left")
        self._matched = np.zeros(len(self.lines), dtype=np.bool_)
        self._example: str | None = None

    def record_matches(self, lines: pa.Array, column: pa.ChunkedArray) -> None:
        """Record the lines, cast to the column's type, that occur in the column."""
        if not self._matched.all():
            self._matched |= pc.is_in(lines, value_set=column.combine_chunks()).to_numpy(
                zero_copy_only=False
            )
        if self._example is None and len(column):
            self._example = str(column[0].as_py())

    def note(self) -> str:
        """Describe the lines that matched no row; "" if all did."""
        total, unmatched = len(self.lines), np.flatnonzero(~self._matched)
        if not total:
            return f"{self.path} has no lines: {self.key} {self.comparison!r} drops nothing"
        if not len(unmatched):
            return ""
        line = self.lines[int(unmatched[0])].as_py()
        several = len(unmatched) > 1
        if len(unmatched) == total:
            what = (
                f"none of the {total:,} lines of {self.path} is"
                if total > 1
                else (f"the line of {self.path} is not")
            )
            like = f"; they look like {line!r}" if several else f": {line!r}"
            here = "" if self._example is None else f", those of the images like {self._example!r}"
            return f"{what} a {self.column} of this source{like}{here}"
        verb = "are" if several else "is"
        return (
            f"{len(unmatched):,} of the {total:,} lines of {self.path} {verb} not a {self.column} "
            f"of this source, such as {line!r}"
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
