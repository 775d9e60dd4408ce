"""Parquet files with a column of encoded images."""

import fnmatch
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysl.augment.crop import Image
from raysl.data.source import Labels, SourceConfig, digest
from raysl.errors import DataError

_MIB = 1 << 20


class _Group(NamedTuple):
    """One row group and where it lies."""

    file: int
    number: int
    rows: int


class ParquetSource:
    """Rows of Parquet files in the order of the files' names.

    Row groups are read whole, the image column alone, and kept while they are likely to be asked
    for again: the plan shuffles within windows that fit into this memory.

    Args:
        config: What to open.
        filesystem: Where the files lie.
        files: Their paths, sorted.
        window_mib: Encoded images to hold for shuffling.

    Raises:
        DataError: If a file is not Parquet, the column is missing or ambiguous, or files differ.
    """

    def __init__(
        self,
        config: SourceConfig,
        filesystem: pafs.FileSystem,
        files: Sequence[str],
        *,
        window_mib: int,
    ) -> None:
        self.name = config.source
        self.filesystem = filesystem
        self.files = list(files)
        self.limit = config.limit
        self._groups: list[_Group] = []
        identity: list[str] = []
        column_bytes = 0
        left = config.limit
        for number, path in enumerate(self.files):
            parquet = self._open(path)
            schema = parquet.schema_arrow
            columns = _image_column(schema, config, path), _label_column(schema, config, path)
            if number == 0:
                self._image_column, self._label_column = columns
            elif columns != (self._image_column, self._label_column):
                raise DataError(
                    f"{path}: images in {columns[0]!r}, labels in {columns[1]!r}; unlike "
                    f"{self.files[0]}: {self._image_column!r}, {self._label_column!r}"
                )
            metadata = parquet.metadata
            sizes = [
                _column_bytes(metadata.row_group(group), self._image_column)
                for group in range(metadata.num_row_groups)
            ]
            name = path.rsplit("/", 1)[-1]
            identity.append(f"{name}:{metadata.num_rows}:{metadata.serialized_size}:{sizes}\n")
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                rows = rows if left is None else min(rows, left)
                if rows == 0:
                    continue
                self._groups.append(_Group(number, group, rows))
                column_bytes += sizes[group]
                left = None if left is None else left - rows
        if not self._groups:
            raise DataError(f"data.source={self.name}: the Parquet files hold no rows")
        self.fingerprint = digest(*identity, str(config.limit))
        self._starts = np.cumsum([0, *(group.rows for group in self._groups)])
        per_image = max(1, column_bytes // int(self._starts[-1]))
        self.window_size: int | None = max(1, window_mib * _MIB // per_image)
        # Two windows: items near the border of two windows ask for row groups of both.
        self._budget = 2 * window_mib * _MIB
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()  # rows are asked for by several threads
        self._labels: Labels | None = None
        self._class_names: list[str] = []
        self._labels_read = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, filesystem=self.filesystem)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {error}") from None

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Rows of each row group."""
        return np.array([group.rows for group in self._groups], dtype=np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[bytes | Image]:
        """Return the encoded images of these rows."""
        groups = np.searchsorted(self._starts, indices, side="right") - 1
        with self._lock:
            columns = {int(group): self._read_group(int(group)) for group in np.unique(groups)}
        return [
            columns[int(group)][int(index - self._starts[group])].as_py() or b""
            for index, group in zip(indices, groups, strict=True)
        ]

    def _read_group(self, number: int) -> pa.ChunkedArray:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        group = self._groups[number]
        path = self.files[group.file]
        try:
            table = self._open(path).read_row_group(group.number, columns=[self._image_column])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} row group {group.number}: cannot be read: {error}") from None
        column = table.column(0)
        if pa.types.is_struct(column.type):
            column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        self._cache[number] = column
        while sum(c.nbytes for c in self._cache.values()) > self._budget and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return column

    def where(self, index: int) -> str:
        """Name a row by its file, row group and place in it."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        group = self._groups[number]
        place = index - int(self._starts[number])
        return f"{self.files[group.file]} row group {group.number} row {place}"

    def labels(self) -> Labels | None:
        """Return class numbers; names are numbered in sorted order, and null is -1."""
        self._read_labels()
        return self._labels

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by number."""
        self._read_labels()
        return self._class_names

    def _read_labels(self) -> None:
        if self._labels_read or self._label_column is None:
            return
        chunks = [
            chunk
            for path in self.files
            for chunk in self._open(path).read(columns=[self._label_column]).column(0).chunks
        ]
        num_images = int(self._starts[-1])
        if all(pa.types.is_integer(chunk.type) for chunk in chunks):
            numbers = [chunk.cast(pa.int64()).fill_null(-1).to_numpy() for chunk in chunks]
            self._labels = np.concatenate(numbers)[:num_images]
            self._class_names = [str(n) for n in range(int(self._labels.max()) + 1)]
        else:
            values = [value for chunk in chunks for value in chunk.to_pylist()][:num_images]
            names = sorted({str(value) for value in values if value is not None})
            number_of = {name: number for number, name in enumerate(names)}
            self._labels = np.array(
                [-1 if value is None else number_of[str(value)] for value in values], np.int64
            )
            self._class_names = names
        self._labels_read = True


def list_parquet(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """List the Parquet files that a path means: itself, those below it, or those it matches."""
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.File:
        return [path]
    is_glob = kind == pafs.FileType.NotFound and any(sign in path for sign in "*?[")
    root = path
    if is_glob:
        root = path[: min(path.index(sign) for sign in "*?[" if sign in path)].rsplit("/", 1)[0]
    if filesystem.get_file_info(root).type != pafs.FileType.Directory:
        return []
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    return sorted(
        info.path
        for info in found
        if info.type == pafs.FileType.File
        and (fnmatch.fnmatch(info.path, path) if is_glob else info.path.endswith(".parquet"))
    )


def _is_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # Hugging Face: {"bytes": binary, "path": string}
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(schema: pa.Schema, config: SourceConfig, path: str) -> str:
    candidates = [field.name for field in schema if _is_images(field.type)]
    name = config.image_column
    if name is None:
        name = "image" if "image" in candidates else candidates[0] if len(candidates) == 1 else None
    if name is None or name not in candidates:
        asked = "" if config.image_column is None else f" called {config.image_column!r}"
        raise DataError(
            f"{path}: no single column of encoded images{asked}; binary columns: "
            f"{', '.join(candidates) or 'none'}; all: {', '.join(schema.names)}. "
            f"Set data.image_column"
        )
    return f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name


def _label_column(schema: pa.Schema, config: SourceConfig, path: str) -> str | None:
    name = config.label_column or ("label" if "label" in schema.names else None)
    if name is not None and name not in schema.names:
        raise DataError(
            f"{path}: no column {name!r} for the labels; columns: {', '.join(schema.names)}. "
            f"Set data.label_column"
        )
    return name


def _column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)
