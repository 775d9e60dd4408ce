"""Read Parquet footers, or a packed folder's manifest, to learn what the files hold."""

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
from raysl.sources.storage import below, num_readers, patiently

T = TypeVar("T")

Ints = npt.NDArray[np.int64]

# The value of the source's ``row_id``, offered to filters as a column of every file.
ROW_ID = "row_id"

_FIRST_FILES, _FILES_AT_ONCE = 16, 256  # bounds what a limit or an error reads ahead
_NAMED_FILES = 5


class DamagedError(DataError):
    """The file is not Parquet or is damaged. A new copy may help; waiting will not."""


class Footer(NamedTuple):
    """The facts about one Parquet file, from its footer or a manifest."""

    path: str
    columns: Columns
    schema: pa.Schema | None
    """None if the file was not opened."""
    rows: Ints
    """Rows in each row group."""
    bytes: Ints
    """Bytes of the images in each row group."""
    identity: str
    """Changes with the file; "" if a manifest's fingerprint stands for all files."""
    nulls: int | None = None
    """Number of rows without an image; None if unknown."""
    kept: Ints | None = None
    """Row numbers that the filter keeps; None without a filter."""


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
        gone = isinstance(error, FileNotFoundError | PermissionError)
        lasting = not gone and is_lasting(filesystem, error, path)
        cure = "; copy it again, or give a folder or glob without it" if lasting else ""
        kind = DamagedError if lasting else DataError
        raise kind(f"{path}: cannot be read as Parquet: {error}{cure}") from None


def open_footer(
    filesystem: pafs.FileSystem, path: str, footer: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Open a Parquet file; errors are pyarrow's."""
    return patiently(
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
    """Read footers, and the columns of the filter, of several files at a time; yield in order.

    One damaged file is an error, not a bad image: a third of a data set could be missing without
    training showing it, and the rows of all other files would shift once the file is repaired. All
    damaged files are collected first, so that they can be repaired together.

    Args:
        filesystem: The file system of the files.
        files: Their paths.
        config: The source's settings.
        root: The folder that ``row_id`` is relative to.
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
        kept = _kept(parquet, filtered, path, root) if config.filter else None
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
    named = "\n".join(f"  {error}" for error in damaged[:_NAMED_FILES])
    more = len(damaged) - _NAMED_FILES
    rest = f"\n  and {more:,} more" if more > 0 else ""
    return DataError(f"{len(damaged):,} of {num_files:,} files are damaged:\n{named}{rest}")


def manifest_footers(
    filesystem: pafs.FileSystem,
    root: str,
    manifest: Manifest,
    config: SourceConfig,
    order: Sequence[int],
    filtered: RowFilter,
) -> Iterator[Footer]:
    """Yield the footers of a manifest's files, which are opened only for a filter.

    Args:
        filesystem: The file system of the files.
        root: Their folder.
        manifest: The folder's manifest.
        config: The source's settings.
        order: Indices of the files to return.
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
            kept = _kept(open_parquet(filesystem, path), filtered, path, root)
        rows, sizes = np.array(file.rows, np.int64), np.array(file.bytes, np.int64)
        return Footer(path, columns, None, rows, sizes, "", None, kept)

    paths = [files[place] for place in order]
    return _in_order(filesystem, paths, read) if config.filter else map(read, paths)


def check_manifest(manifest: Manifest, files: pa.Table, root: str) -> None:
    """Compare a manifest with a listing of its folder.

    Args:
        manifest: The manifest of the folder.
        files: ``path`` (relative to the folder) and ``bytes`` of its Parquet files.
        root: The folder.

    Raises:
        DataError: If a file is missing, of another size, or not in the manifest.
    """
    paths = [path.decode(errors="replace") for path in files.column("path").to_pylist()]
    there = dict(zip(paths, files.column("bytes").to_pylist(), strict=True))
    advice = (
        f"Run raysl pack again, or remove {MANIFEST_NAME} to read what is there by the files' "
        f"own footers"
    )
    for file in manifest.files:
        size = there.pop(file.path, None)
        if size is None:
            raise DataError(f"{root}/{file.path}: is missing; {MANIFEST_NAME} lists it. {advice}")
        if size != file.size_bytes:
            raise DataError(
                f"{root}/{file.path}: has {size:,} bytes, but {file.size_bytes:,} in "
                f"{MANIFEST_NAME}. {advice}"
            )
    if there:
        raise DataError(f"{root}/{next(iter(there))}: is not in {MANIFEST_NAME}. {advice}")


def describe_choice(config: SourceConfig) -> str:
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
    waiting, at_once = iter(files), _FIRST_FILES
    with ThreadPoolExecutor(num_readers(filesystem)) as pool:
        while some := list(islice(waiting, at_once)):
            yield from pool.map(read, some)
            at_once = min(2 * at_once, _FILES_AT_ONCE)


def _kept(parquet: pq.ParquetFile, filtered: RowFilter, path: str, root: str) -> Ints:
    wanted, name = columns_of(filtered.conditions), below(path, root)
    there = [column for column in parquet.schema_arrow.names if column != ROW_ID]
    added = {c: v for c, v in partition_values(name).items() if c not in there and c != ROW_ID}
    columns = [column for column in wanted if column in there]
    try:
        # A column name also selects columns whose names continue after a dot.
        table = parquet.read(columns=columns).select(columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not {*wanted} <= {*there, *added, ROW_ID}:  # list every column that exists
        table = parquet.schema_arrow.empty_table().select(there)
    for column, value in added.items():
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
    """Return whether a Parquet file holds encoded images, or the column named by the settings.

    Raises:
        DataError: If it cannot be read or is not Parquet.
    """
    schema = open_parquet(filesystem, path).schema_arrow
    return config.image_column in schema.names or any(is_encoded(f.type) for f in schema)
