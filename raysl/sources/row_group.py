"""Read the images of one row group of a Parquet file."""

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysl.sources.columns import Columns, as_bytes, leaf_index
from raysl.sources.storage import with_retries


class Images(NamedTuple):
    """The encoded images of a row group, and the paths of those that are null."""

    encoded: pa.ChunkedArray
    paths: pa.ChunkedArray | None

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return int(self.encoded.nbytes + (0 if self.paths is None else self.paths.nbytes))


def read_images(
    filesystem: pafs.FileSystem, parquet: pq.ParquetFile, number: int, columns: Columns
) -> Images:
    """Read the images of a row group, and their paths if an image is null.

    Raises:
        KeyError: If the file lacks a column.
        IndexError: If the file lacks the row group.
        OSError, ArrowException: If the file cannot be read.
    """
    image, paths = columns.image, columns.paths
    encoded = read_column(filesystem, parquet, [number], image)
    if paths == image:
        return Images(pa.chunked_array([pa.nulls(len(encoded), pa.binary())]), encoded)
    encoded = as_bytes(encoded)
    if paths is None or not encoded.null_count:
        return Images(encoded, None)
    return Images(encoded, read_column(filesystem, parquet, [number], paths))


def read_column(
    filesystem: pafs.FileSystem, parquet: pq.ParquetFile, numbers: Sequence[int], column: str
) -> pa.ChunkedArray:
    """Read a column, or a field of a struct, of some row groups.

    Raises:
        KeyError: If the file lacks the column.
        IndexError: If the file lacks a row group.
        OSError, ArrowException: If the file cannot be read.
    """
    if max(numbers) >= parquet.metadata.num_row_groups:
        raise IndexError(max(numbers))
    table = with_retries(filesystem, lambda: parquet.read_row_groups(numbers, columns=[column]))
    if column in table.column_names:  # beside columns whose names begin with it and a dot
        return table.column(column)
    name, _, part = column.rpartition(".")
    if name not in table.column_names or not pa.types.is_struct(table.schema.field(name).type):
        raise KeyError(column)
    whole = table.column(name)
    kind = whole.type.field(part).type
    return pa.chunked_array([chunk.field(part) for chunk in whole.chunks], kind)


def span_of(metadata: pq.FileMetaData, number: int, columns: Columns) -> tuple[int, int]:
    """Return the offset of a row group's images in the file, and their length in bytes.

    Returns (0, 1) if the file lacks the column or the row group.
    """
    index = leaf_index(metadata, columns.image)
    if index is None or number >= metadata.num_row_groups:
        return 0, 1
    chunk = metadata.row_group(number).column(index)
    return chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size
