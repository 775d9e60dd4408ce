"""Report how many downloads succeeded and failed, from the tables of img2dataset."""

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
from raysl.sources.storage import num_readers, with_retries

_MOST_FILES = 200
_SHOWN = 3
_LONGEST_ERROR = 80
_SUCCESS = "success"


class _Results(NamedTuple):
    """The download results in the rows of a file."""

    status: Counter[str]
    """Number of rows by status."""
    errors: Counter[str]
    """Number of failed rows by error message."""


def download_notes(filesystem: pafs.FileSystem, parquet_files: Sequence[str]) -> tuple[str, ...]:
    """Return notes on how many images were downloaded, how many failed, and why.

    Reads two columns of at most 200 files, evenly spaced, and counts files that cannot be read or
    lack these columns.

    Args:
        filesystem: The file system of the files.
        parquet_files: Paths of the tables.
    """
    selected = spread_rows(len(parquet_files), _MOST_FILES).tolist()
    with ThreadPoolExecutor(num_readers(filesystem)) as pool:
        results = list(pool.map(lambda index: _read(filesystem, parquet_files[index]), selected))
    readable = [each for each in results if each is not None]
    notes = []
    if readable:
        status, errors = Counter[str](), Counter[str]()
        for each in readable:
            status.update(each.status)
            errors.update(each.errors)
        part = f" ({len(selected):,} of the {len(parquet_files):,} tables looked at)"
        notes.append(
            _summary(status, errors) + (part if len(selected) < len(parquet_files) else "")
        )
    if unreadable := len(results) - len(readable):
        verb = "has" if unreadable == 1 else "have"
        notes.append(
            f"{counted(unreadable, 'Parquet file')} of {len(results):,} beside the images cannot "
            f"be read or {verb} no column 'status'"
        )
    return tuple(notes)


def _read(filesystem: pafs.FileSystem, path: str) -> _Results | None:
    def read() -> pa.Table:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            wanted = [n for n in ("status", "error_message") if n in file.schema_arrow.names]
            return file.read(columns=wanted)

    try:
        table = with_retries(filesystem, read)
        if "status" not in table.column_names:
            return None
        status = _count(table.column("status"))
        errors = Counter[str]()
        if "error_message" in table.column_names:
            errors = _count(table.column("error_message"))
            errors.pop("", None)
        return _Results(status, errors)
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
