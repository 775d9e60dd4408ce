"""Report from img2dataset's tables how many downloads succeeded and failed."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysl.errors import counted
from raysl.sources.source import spread_rows
from raysl.sources.storage import num_readers, patiently

_MOST_FILES = 200
_SHOWN = 3
_LONGEST_ERROR = 80
_SUCCESS = "success"


class _Rows(NamedTuple):
    """Download results of the rows of one or more files."""

    status: Counter[str]
    errors: Counter[str]


def failed_rows(filesystem: pafs.FileSystem, parquet_files: Sequence[str]) -> tuple[str, ...]:
    """Return notes of how many images were downloaded, how many failed, and why.

    Reads two columns of at most 200 files, evenly spaced. Files without these columns, or
    unreadable ones, are counted.

    Args:
        filesystem: The file system of the files.
        parquet_files: Their paths.
    """
    chosen = spread_rows(len(parquet_files), _MOST_FILES).tolist()
    with ThreadPoolExecutor(num_readers(filesystem)) as pool:
        read = list(pool.map(lambda place: _read(filesystem, parquet_files[place]), chosen))
    readable = [rows for rows in read if rows is not None]
    notes = []
    if readable:
        status, errors = Counter[str](), Counter[str]()
        for rows in readable:
            status.update(rows.status)
            errors.update(rows.errors)
        part = f" ({len(chosen):,} of the {len(parquet_files):,} tables looked at)"
        notes.append(_summary(status, errors) + (part if len(chosen) < len(parquet_files) else ""))
    if lost := len(read) - len(readable):
        notes.append(
            f"{counted(lost, 'Parquet file')} of {len(read):,} beside the images cannot be read or "
            f"{'has' if lost == 1 else 'have'} no column 'status'"
        )
    return tuple(notes)


def _read(filesystem: pafs.FileSystem, path: str) -> _Rows | None:
    def read() -> pa.Table:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            wanted = [n for n in ("status", "error_message") if n in file.schema_arrow.names]
            return file.read(columns=wanted)

    try:
        table = patiently(filesystem, read)
        if "status" not in table.column_names:
            return None
        status = _count(table.column("status"))
        errors = Counter[str]()
        if "error_message" in table.column_names:
            errors = _count(table.column("error_message"))
            errors.pop("", None)
        return _Rows(status, errors)
    except (OSError, ValueError, pa.ArrowException):  # invalid UTF-8 is a ValueError
        return None


def _count(column: pa.ChunkedArray) -> Counter[str]:
    texts = pc.fill_null(column.cast(pa.string()), "")
    return Counter({each["values"]: each["counts"] for each in pc.value_counts(texts).to_pylist()})


def _summary(status: Counter[str], errors: Counter[str]) -> str:
    total, good = status.total(), status[_SUCCESS]
    line = f"{good:,} of {counted(total, 'row')} of the metadata downloaded"
    if good == total:
        return line
    kinds = ", ".join(
        f"{kind or 'no status'} {count:,}"
        for kind, count in status.most_common()
        if kind != _SUCCESS
    )
    line += f", {total - good:,} not ({kinds})"
    examples = ", ".join(
        f"{' '.join(text.split())[:_LONGEST_ERROR]} {count:,}"
        for text, count in errors.most_common(_SHOWN)
    )
    return f"{line}; most often: {examples}" if examples else line
