"""Which rows of a source to keep, by what is known of them: columns, paths, sizes."""

import fnmatch
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
    """Return the columns that the conditions ask for, each once."""
    return list(dict.fromkeys(column for column, _, _ in conditions))


def keep(table: pa.Table, conditions: Sequence[Condition], *, where: str) -> npt.NDArray[np.bool_]:
    """Return which rows of a table fulfil all conditions, ``(num_rows,)``.

    Args:
        table: Has at least the columns that the conditions ask for.
        conditions: All must hold.
        where: Name of the table for the error message.

    Raises:
        DataError: If a column is missing or cannot be compared with the value.
    """
    kept = np.ones(table.num_rows, dtype=np.bool_)
    for condition in conditions:
        column, comparison, value = condition
        shown = f"data.filter {list(condition)}"
        if column not in table.column_names:
            raise DataError(
                f"{where}: {shown}: no column {column!r}; there are "
                f"{', '.join(table.column_names) or 'none'}"
            )
        try:
            kept &= _holds(table.column(column), comparison, value)
        except (pa.ArrowException, TypeError, ValueError) as error:
            kind = table.schema.field(column).type
            raise DataError(
                f"{where}: {shown}: the column holds {kind}, which does not compare: {error}"
            ) from None
    return kept


def _holds(column: pa.ChunkedArray, comparison: str, value: Any) -> npt.NDArray[np.bool_]:
    if comparison == "matches":
        texts = column.cast(pa.string()).to_pylist()
        return np.array(
            [t is not None and fnmatch.fnmatchcase(t, str(value)) for t in texts], dtype=np.bool_
        )
    if comparison in ("in file", "not in file"):
        return _listed(column, str(value), wanted=comparison == "in file")
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


def _listed(column: pa.ChunkedArray, path: str, *, wanted: bool) -> npt.NDArray[np.bool_]:
    """Return which rows have a value that stands, or does not stand, on a line of a text file."""
    text = read_file(*resolve(path)).decode(errors="surrogateescape")
    lines = pa.array(text.splitlines(), pa.string()).cast(column.type)
    listed = pc.is_in(column, value_set=lines)
    kept = pc.and_(listed if wanted else pc.invert(listed), pc.is_valid(column))
    return np.asarray(kept.to_numpy(zero_copy_only=False), dtype=np.bool_)
