"""Read Parquet footers, or a packed folder's manifest: columns, rows and sizes of the files."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysl.errors import DataError
from raysl.sources.columns import Columns, find_columns, is_encoded, leaf_of, partition_values
from raysl.sources.filter import RowFilter, columns_of, describe_filter
from raysl.sources.lasting import is_lasting
from raysl.sources.manifest import MANIFEST_NAME, Manifest
from raysl.sources.source import SourceConfig
from raysl.sources.storage import below, num_readers, with_retries

T = TypeVar("T")

Ints = npt.NDArray[np.int64]

# Name of the column with ``Source.row_id``, which filters can read in every file.
ROW_ID = "row_id"

_FIRST_FILES, _FILES_AT_ONCE = 16, 256  # few at first: a limit or an error may stop early
_NAMED_FILES = 5


class DamagedError(DataError):
    """The file is not Parquet or is damaged. A new copy may help; waiting will not."""


class Footer(NamedTuple):
    """Columns, rows and sizes of one Parquet file, from its footer or a manifest."""

    path: str
    columns: Columns
    schema: pa.Schema | None
    """None if the file was not opened."""
    rows: Ints
    """Rows in each row group."""
    bytes: Ints
    """Bytes of the images in each row group."""
    identity: str
    """Text that changes with the file; "" if a manifest's fingerprint stands for all files."""
    nulls: int | None = None
    """Number of rows without an image; None if unknown."""
    kept: Ints | None = None
    """Indices in the file of the rows that the filter keeps; None without a filter."""


def open_parquet(
    filesystem: pafs.FileSystem, path: str, footer: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        DamagedError: If it is not Parquet.
        DataError: If it cannot be read.
    """
    try:
        return open_footer(filesystem, path, footer)
    except (OSError, pa.ArrowException) as error:
        is_missing = isinstance(error, FileNotFoundError | PermissionError)
        lasting = not is_missing and is_lasting(filesystem, error, path)
        cure = "; copy it again, or give a folder or glob without it" if lasting else ""
        kind = DamagedError if lasting else DataError
        raise kind(f"{path}: cannot be read as Parquet: {error}{cure}") from None


def open_footer(
    filesystem: pafs.FileSystem, path: str, footer: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Open a Parquet file; errors are pyarrow's."""
    return with_retries(
        filesystem,
        lambda: pq.ParquetFile(path, filesystem=filesystem, metadata=footer, pre_buffer=True),
    )


def read_footers(
    filesystem: pafs.FileSystem,
    files: Sequence[str],
    config: SourceConfig,
    root: str,
    filtered: RowFilter,
) -> Iterator[Footer]:
    """Yield the footers of files in order, with the rows that the filter keeps.

    A damaged file is an error, not a bad image: otherwise a third of a data set could be missing
    unnoticed, and a repaired file would shift the rows of all files after it. The error lists all
    damaged files, so that they can be repaired together.

    Args:
        filesystem: The file system of the files.
        files: Paths of the files.
        config: The source's settings.
        root: Folder that ``row_id`` is relative to.
        filtered: The source's filter.

    Raises:
        DataError: If files are not Parquet, or their columns do not fit.
    """

    def read(path: str) -> Footer | DamagedError:
        try:
            parquet = open_parquet(filesystem, path)
        except DamagedError as error:
            return error
        schema, metadata = parquet.schema_arrow, parquet.metadata
        columns = find_columns(schema, config, path, partition_values(below(path, root)))
        rows, sizes, nulls = _row_groups(metadata, columns.image)
        name = path.rsplit("/", 1)[-1]
        identity = f"{name}:{metadata.num_rows}:{metadata.serialized_size}:{sizes.tolist()}\n"
        kept = _selected_rows(parquet, filtered, path, root) if config.filter else None
        return Footer(path, columns, schema, rows, sizes, identity, nulls, kept)

    damaged = []
    for footer in _in_order(filesystem, files, read):
        if isinstance(footer, Footer):
            yield footer
            continue
        damaged.append(footer)
        if config.limit is not None:  # may stop before the last file
            break
    if damaged:
        raise _all_damaged(damaged, len(files))


def _all_damaged(damaged: Sequence[DamagedError], num_files: int) -> DataError:
    if len(damaged) == 1:
        return damaged[0]
    errors = "\n".join(f"  {error}" for error in damaged[:_NAMED_FILES])
    more = len(damaged) - _NAMED_FILES
    rest = f"\n  and {more:,} more" if more > 0 else ""
    return DataError(f"{len(damaged):,} of {num_files:,} files are damaged:\n{errors}{rest}")


def manifest_footers(
    filesystem: pafs.FileSystem,
    root: str,
    manifest: Manifest,
    config: SourceConfig,
    order: Sequence[int],
    filtered: RowFilter,
) -> Iterator[Footer]:
    """Yield the footers of a manifest's files; only a filter opens the files.

    Args:
        filesystem: The file system of the files.
        root: Folder of the manifest and its files.
        manifest: The folder's manifest.
        config: The source's settings.
        order: Indices of the files to read, in this order.
        filtered: The source's filter.
    """
    manifest_file = {f"{root.rstrip('/')}/{file.path}": file for file in manifest.files}
    files = list(manifest_file)
    label = config.label_column or manifest.label_column
    names = manifest.class_names if label == manifest.label_column else ()
    columns = Columns(manifest.image_column, None, label, False, names)

    def read(path: str) -> Footer:
        file, kept = manifest_file[path], None
        if config.filter:
            kept = _selected_rows(open_parquet(filesystem, path), filtered, path, root)
        rows, sizes = np.array(file.rows, np.int64), np.array(file.bytes, np.int64)
        return Footer(path, columns, None, rows, sizes, "", None, kept)

    paths = [files[place] for place in order]
    return _in_order(filesystem, paths, read) if config.filter else map(read, paths)


def check_manifest(manifest: Manifest, files: pa.Table, root: str) -> None:
    """Compare a manifest with a listing of its folder.

    Args:
        manifest: The manifest of the folder.
        files: Table of ``path`` (relative to the folder) and ``bytes`` of its Parquet files.
        root: Path of the folder.

    Raises:
        DataError: If a file is missing, of another size, or not in the manifest.
    """
    paths = [path.decode(errors="replace") for path in files.column("path").to_pylist()]
    listed_sizes = dict(zip(paths, files.column("bytes").to_pylist(), strict=True))
    advice = (
        f"Run raysl pack again, or remove {MANIFEST_NAME} to read the files by their own footers"
    )
    for file in manifest.files:
        size = listed_sizes.pop(file.path, None)
        if size is None:
            raise DataError(f"{root}/{file.path}: is missing; {MANIFEST_NAME} lists it. {advice}")
        if size != file.size_bytes:
            raise DataError(
                f"{root}/{file.path}: has {size:,} bytes, but {file.size_bytes:,} in "
                f"{MANIFEST_NAME}. {advice}"
            )
    if listed_sizes:
        raise DataError(f"{root}/{next(iter(listed_sizes))}: is not in {MANIFEST_NAME}. {advice}")


def describe_selection(config: SourceConfig) -> str:
    """Return a text that changes with the filter and the limit; "" without them."""
    if not config.filter and config.limit is None:
        return ""
    return json.dumps([describe_filter(config.filter), config.limit])


def _in_order(
    filesystem: pafs.FileSystem, files: Sequence[str], read: Callable[[str], T]
) -> Iterator[T]:
    if len(files) == 1:
        yield read(files[0])
        return
    remaining, at_once = iter(files), _FIRST_FILES
    with ThreadPoolExecutor(num_readers(filesystem)) as pool:
        while chunk := list(islice(remaining, at_once)):
            yield from pool.map(read, chunk)
            at_once = min(2 * at_once, _FILES_AT_ONCE)


def _selected_rows(parquet: pq.ParquetFile, filtered: RowFilter, path: str, root: str) -> Ints:
    """Return the indices in the file of the rows that the filter keeps."""
    filter_columns, name = columns_of(filtered.conditions), below(path, root)
    in_file = [column for column in parquet.schema_arrow.names if column != ROW_ID]
    in_path = {c: v for c, v in partition_values(name).items() if c not in in_file and c != ROW_ID}
    columns = [column for column in filter_columns if column in in_file]
    try:
        # ``read`` also returns columns whose names begin with a requested name and a dot.
        table = parquet.read(columns=columns).select(columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not {*filter_columns} <= {*in_file, *in_path, ROW_ID}:  # the error lists every column
        table = parquet.schema_arrow.empty_table().select(in_file)
    for column, value in in_path.items():
        table = table.append_column(column, pa.repeat(pa.scalar(value), table.num_rows))
    numbers = pa.array(np.arange(table.num_rows)).cast(pa.string())
    table = table.append_column(ROW_ID, pc.binary_join_element_wise(f"{name}:", numbers, ""))
    return np.flatnonzero(filtered.keep(table, where=path))


def _row_groups(metadata: pq.FileMetaData, image_column: str) -> tuple[Ints, Ints, int | None]:
    """Return rows and image bytes of each row group, and the number of rows without an image."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    leaf = leaf_of(metadata, image_column)
    rows = np.array([group.num_rows for group in groups], dtype=np.int64)
    if leaf is None:
        return rows, np.zeros_like(rows), None
    chunks = [group.column(leaf) for group in groups]
    sizes = np.array([chunk.total_uncompressed_size for chunk in chunks], dtype=np.int64)
    # For lists, the footer counts missing values, not rows.
    if metadata.schema.column(leaf).max_repetition_level > 0:
        return rows, sizes, None
    if metadata.schema.column(leaf).physical_type == "INT32":  # type null, not bytes
        return rows, sizes, int(rows.sum())
    statistics = [chunk.statistics for chunk in chunks]
    is_complete = all(each is not None and each.has_null_count for each in statistics)
    return rows, sizes, sum(each.null_count for each in statistics) if is_complete else None


def has_images(filesystem: pafs.FileSystem, path: str, config: SourceConfig) -> bool:
    """Return whether a Parquet file holds encoded images, or the column ``image_column``.

    Raises:
        DataError: If it cannot be read or is not Parquet.
    """
    schema = open_parquet(filesystem, path).schema_arrow
    return config.image_column in schema.names or any(is_encoded(f.type) for f in schema)
