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
from raysl.sources.columns import Columns, find_columns, is_encoded, leaf_index, partition_values
from raysl.sources.filter import RowFilter, columns_of, describe_filter
from raysl.sources.lasting import is_lasting
from raysl.sources.manifest import MANIFEST_NAME, Manifest
from raysl.sources.source import SourceConfig
from raysl.sources.storage import num_readers, relative_path, with_retries

T = TypeVar("T")

Ints = npt.NDArray[np.int64]

# Virtual column that holds `Source.row_id`; filters can use it in every file.
ROW_ID = "row_id"

_FIRST_CHUNK, _MAX_CHUNK = 16, 256  # grows: a limit or an error may end reading
_MAX_LISTED_ERRORS = 5


class DamagedError(DataError):
    """The file is not Parquet or is damaged. A new copy may help; a retry will not."""


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
    """Text that changes with the file; "" if a manifest's fingerprint covers all files."""
    nulls: int | None = None
    """Number of rows without an image; None if unknown."""
    kept: Ints | None = None
    """Row numbers in the file that the filter keeps; None without a filter."""


def open_parquet(
    filesystem: pafs.FileSystem, path: str, metadata: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        DamagedError: If it is not Parquet.
        DataError: If it cannot be read.
    """
    try:
        return open_parquet_raw(filesystem, path, metadata)
    except (OSError, pa.ArrowException) as error:
        is_inaccessible = isinstance(error, FileNotFoundError | PermissionError)
        is_permanent = not is_inaccessible and is_lasting(filesystem, error, path)
        cure = "; copy it again, or exclude it from the folder or glob" if is_permanent else ""
        kind = DamagedError if is_permanent else DataError
        raise kind(f"{path}: cannot be read as Parquet: {error}{cure}") from None


def open_parquet_raw(
    filesystem: pafs.FileSystem, path: str, metadata: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Open a Parquet file; raise pyarrow errors."""
    return with_retries(
        filesystem,
        lambda: pq.ParquetFile(path, filesystem=filesystem, metadata=metadata, pre_buffer=True),
    )


def read_footers(
    filesystem: pafs.FileSystem,
    files: Sequence[str],
    config: SourceConfig,
    root: str,
    row_filter: RowFilter,
) -> Iterator[Footer]:
    """Yield the footers of files in order, with the rows that the filter keeps.

    A damaged file is an error, not many bad images: otherwise much of a data set could be missing
    unnoticed. The error lists several damaged files, so that they can be repaired together.

    Args:
        filesystem: The file system of the files.
        files: Paths of the files.
        config: The source's settings.
        root: Base folder of paths in ``row_id``.
        row_filter: The source's filter.

    Raises:
        DataError: If a file is not Parquet, or a column is missing or ambiguous.
    """

    def read(path: str) -> Footer | DamagedError:
        try:
            parquet = open_parquet(filesystem, path)
        except DamagedError as error:
            return error
        schema, metadata = parquet.schema_arrow, parquet.metadata
        columns = find_columns(schema, config, path, partition_values(relative_path(path, root)))
        rows, sizes, nulls = _row_groups(metadata, columns.image)
        name = path.rsplit("/", 1)[-1]
        identity = f"{name}:{metadata.num_rows}:{metadata.serialized_size}:{sizes.tolist()}\n"
        kept = _selected_rows(parquet, row_filter, path, root) if config.filter else None
        return Footer(path, columns, schema, rows, sizes, identity, nulls, kept)

    damaged = []
    for result in _map_in_order(filesystem, files, read):
        if isinstance(result, Footer):
            yield result
            continue
        damaged.append(result)
        if config.limit is not None:  # caller may need no more files
            break
    if damaged:
        raise _all_damaged(damaged, len(files))


def _all_damaged(damaged: Sequence[DamagedError], num_files: int) -> DataError:
    if len(damaged) == 1:
        return damaged[0]
    errors = "\n".join(f"  {error}" for error in damaged[:_MAX_LISTED_ERRORS])
    more = len(damaged) - _MAX_LISTED_ERRORS
    rest = f"\n  and {more:,} more" if more > 0 else ""
    return DataError(f"{len(damaged):,} of {num_files:,} files are damaged:\n{errors}{rest}")


def manifest_footers(
    filesystem: pafs.FileSystem,
    root: str,
    manifest: Manifest,
    config: SourceConfig,
    order: Sequence[int],
    row_filter: RowFilter,
) -> Iterator[Footer]:
    """Yield the footers of a manifest's files; open them only to filter.

    Args:
        filesystem: The file system of the files.
        root: Folder of the manifest and its files.
        manifest: The folder's manifest.
        config: The source's settings.
        order: Indices of the files to read, in this order.
        row_filter: The source's filter.
    """
    file_by_path = {f"{root.rstrip('/')}/{file.path}": file for file in manifest.files}
    files = list(file_by_path)
    label = config.label_column or manifest.label_column
    names = manifest.class_names if label == manifest.label_column else ()
    columns = Columns(
        image=manifest.image_column,
        paths=None,
        label=label,
        label_in_path=False,
        class_names=names,
    )

    def read(path: str) -> Footer:
        file, kept = file_by_path[path], None
        if config.filter:
            kept = _selected_rows(open_parquet(filesystem, path), row_filter, path, root)
        rows, sizes = np.array(file.rows, np.int64), np.array(file.bytes, np.int64)
        return Footer(path, columns, None, rows, sizes, "", None, kept)

    paths = [files[index] for index in order]
    return _map_in_order(filesystem, paths, read) if config.filter else map(read, paths)


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
    advice = f"Run raysl pack again, or remove {MANIFEST_NAME} to use the files' own footers"
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


def selection_key(config: SourceConfig) -> str:
    """Return a text that changes with the filter and the limit; "" without them."""
    if not config.filter and config.limit is None:
        return ""
    return json.dumps([describe_filter(config.filter), config.limit])


def _map_in_order(
    filesystem: pafs.FileSystem, files: Sequence[str], read: Callable[[str], T]
) -> Iterator[T]:
    """Yield results of ``read`` in file order, read by threads."""
    if len(files) == 1:
        yield read(files[0])
        return
    remaining, at_once = iter(files), _FIRST_CHUNK
    with ThreadPoolExecutor(num_readers(filesystem)) as pool:
        while chunk := list(islice(remaining, at_once)):
            yield from pool.map(read, chunk)
            at_once = min(2 * at_once, _MAX_CHUNK)


def _selected_rows(parquet: pq.ParquetFile, row_filter: RowFilter, path: str, root: str) -> Ints:
    """Return the row numbers in the file that the filter keeps."""
    filter_columns, name = columns_of(row_filter.conditions), relative_path(path, root)
    file_columns = [column for column in parquet.schema_arrow.names if column != ROW_ID]
    path_values = {
        c: v for c, v in partition_values(name).items() if c not in file_columns and c != ROW_ID
    }
    columns = [column for column in filter_columns if column in file_columns]
    try:
        # ``read`` also returns columns whose names begin with a requested name and a dot.
        table = parquet.read(columns=columns).select(columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not {*filter_columns} <= {*file_columns, *path_values, ROW_ID}:
        # Makes keep() list all columns.
        table = parquet.schema_arrow.empty_table().select(file_columns)
    for column, value in path_values.items():
        table = table.append_column(column, pa.repeat(pa.scalar(value), table.num_rows))
    numbers = pa.array(np.arange(table.num_rows)).cast(pa.string())
    table = table.append_column(ROW_ID, pc.binary_join_element_wise(f"{name}:", numbers, ""))
    return np.flatnonzero(row_filter.keep(table, where=path))


def _row_groups(metadata: pq.FileMetaData, image_column: str) -> tuple[Ints, Ints, int | None]:
    """Return rows and image bytes of each row group, and the number of rows without an image."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    index = leaf_index(metadata, image_column)
    rows = np.array([group.num_rows for group in groups], dtype=np.int64)
    if index is None:  # not expected: find_columns chose a column of this footer
        return rows, np.zeros_like(rows), None
    chunks = [group.column(index) for group in groups]
    sizes = np.array([chunk.total_uncompressed_size for chunk in chunks], dtype=np.int64)
    # For lists, null_count is of values, not rows.
    if metadata.schema.column(index).max_repetition_level > 0:
        return rows, sizes, None
    if metadata.schema.column(index).physical_type == "INT32":  # Arrow type null
        return rows, sizes, int(rows.sum())
    statistics = [chunk.statistics for chunk in chunks]
    is_complete = all(each is not None and each.has_null_count for each in statistics)
    return rows, sizes, sum(each.null_count for each in statistics) if is_complete else None


def may_have_images(filesystem: pafs.FileSystem, path: str, config: SourceConfig) -> bool:
    """Return whether a file has a column of image bytes, or the configured image column.

    Raises:
        DataError: If it cannot be read or is not Parquet.
    """
    schema = open_parquet(filesystem, path).schema_arrow
    return config.image_column in schema.names or any(is_encoded(f.type) for f in schema)
