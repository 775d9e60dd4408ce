"""Parquet files with a column of encoded images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysl.errors import DataError
from raysl.sources.cache import ByteCache
from raysl.sources.footers import (
    Ints,
    describe_choice,
    gather,
    manifest_footers,
    open_parquet,
    read_footers,
)
from raysl.sources.labels import number_classes
from raysl.sources.manifest import Manifest
from raysl.sources.pixels import Decoding
from raysl.sources.source import Encoded, Labels, SourceConfig, digest
from raysl.sources.storage import (
    HIDDEN,
    REMOTE_READERS,
    is_local,
    list_files,
    list_glob,
    num_readers,
    patiently,
    readable,
)

_MIB = 1 << 20
_FOOTER_BYTES = 32 * _MIB  # of files that are read from again and again


class ParquetSource:
    """Rows of Parquet files in the order of the files' names.

    Row groups are read whole, the image column alone, and kept while they are likely to be asked
    for again: the plan shuffles within windows that fit into this memory.

    Args:
        config: What to open.
        filesystem: Where the files lie.
        files: Their paths, sorted; with a manifest, in its order.
        window_mib: Encoded images to hold for shuffling.
        manifest: What ``raysl pack`` wrote of these files: their footers are not read then.
        root: The folder of the manifest.

    Raises:
        DataError: If a file is not Parquet, the column is missing or ambiguous, files differ, or
            the filter leaves no row.
    """

    def __init__(
        self,
        config: SourceConfig,
        filesystem: pafs.FileSystem,
        files: Sequence[str],
        *,
        window_mib: int,
        splits: Sequence[str] = (),
        notes: Sequence[str] = (),
        manifest: Manifest | None = None,
        root: str = "",
    ) -> None:
        self.name = config.source
        self.filesystem = filesystem
        self.notes = tuple(notes)
        self.splits = tuple(splits)
        self.label_advice = "set data.label_column to a column of classes"
        self._decoding = config.decoding()
        self.weights: npt.NDArray[np.float64] | None = None
        footers = (
            read_footers(filesystem, files, config)
            if manifest is None
            else manifest_footers(filesystem, root, manifest, config)
        )
        looked, groups, fingerprint = gather(footers, config.limit)
        if len(groups.rows) == 0:
            what = (
                "the filter leaves no rows" if config.filter else "the Parquet files hold no rows"
            )
            raise DataError(f"data.source={self.name}: {what}")
        self._image_column, self._label_column = looked[0].image_column, looked[0].label_column
        choice = describe_choice(config)
        self.fingerprint = digest(manifest.fingerprint if manifest else "", fingerprint, choice)
        if manifest is not None and not choice:
            self.fingerprint = manifest.fingerprint
        # One Arrow column instead of as many Python strings to send to every worker.
        self._files = pa.array([footer.path for footer in looked], pa.large_string())
        self._file, self._number, self._rows, self._places, num_bytes = groups
        self._starts = _starts(self._rows)
        per_image = max(1, num_bytes // int(self._starts[-1]))
        self.window_size: int | None = max(1, window_mib * _MIB // per_image)
        # Two windows: items near the border of two windows ask for row groups of both.
        self._cache: ByteCache[pa.ChunkedArray] = ByteCache(2 * window_mib * _MIB)
        self._footers: ByteCache[pq.FileMetaData] = ByteCache(_FOOTER_BYTES)
        named = manifest is not None and self._label_column == manifest.label_column
        self._packed_names = list(manifest.class_names) if manifest and named else []
        self._labels: Labels | None = None
        self._class_names: list[str] = []
        self._labels_read = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_starts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _starts=_starts(state["_rows"]))

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Rows of each row group that are kept."""
        return self._rows

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the encoded images of these rows.

        Raises:
            DataError: If a row group cannot be read.
        """
        rows = np.asarray(indices, dtype=np.int64)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[groups] if self._places is None else self._places[rows]
        asked = [int(group) for group in np.unique(groups)]
        if len(asked) > 1 and not is_local(self.filesystem):
            with ThreadPoolExecutor(min(len(asked), REMOTE_READERS)) as pool:
                columns = dict(zip(asked, pool.map(self._group, asked), strict=True))
        else:
            columns = {group: self._group(group) for group in asked}
        return [
            columns[group][place].as_py() or b""
            for group, place in zip(groups.tolist(), places.tolist(), strict=True)
        ]

    def _group(self, group: int) -> pa.ChunkedArray:
        return self._cache.get(group, lambda: self._read_group(group))

    def _open(self, path: str) -> pq.ParquetFile:
        """Open a file; its footer is kept for the other row groups."""
        opened: list[pq.ParquetFile] = []

        def read() -> tuple[pq.FileMetaData, int]:
            opened.append(open_parquet(self.filesystem, path))
            return opened[0].metadata, opened[0].metadata.serialized_size

        footer = self._footers.get(path, read)
        return opened[0] if opened else open_parquet(self.filesystem, path, footer)

    def _read_group(self, group: int) -> tuple[pa.ChunkedArray, int]:
        path, number = self._path(group), int(self._number[group])
        parquet = self._open(path)
        try:
            table = patiently(
                self.filesystem,
                lambda: parquet.read_row_group(number, columns=[self._image_column]),
            )
            if table.num_columns == 0:
                raise DataError(f"{path}: no column {self._image_column!r}")
        except (OSError, IndexError, pa.ArrowException) as error:
            raise DataError(f"{path} row group {number}: cannot be read: {error}") from None
        column = table.column(0)
        if pa.types.is_struct(column.type):
            column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        return column, column.nbytes

    def _path(self, group: int) -> str:
        return str(self._files[int(self._file[group])].as_py())

    def decoding(self, index: int) -> Decoding:
        """Return what the source's settings say of its images."""
        return self._decoding

    def row_id(self, index: int) -> str:
        """Name a row by its file and its place in it."""
        return self.where(index)

    def where(self, index: int) -> str:
        """Name a row by its file, row group and place in it."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        first = self._starts[group]
        place = index - first if self._places is None else self._places[index]
        return f"{self._path(group)} row group {self._number[group]} row {place}"

    def labels(self) -> Labels | None:
        """Return class numbers; names are numbered in sorted order, and null is -1.

        Raises:
            DataError: If the column cannot be read, or holds integers that are no class numbers.
        """
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
        with ThreadPoolExecutor(num_readers(self.filesystem)) as pool:
            columns = list(pool.map(self._file_labels, np.unique(self._file).tolist()))
        chunks = [chunk for column in columns for chunk in column.chunks]
        # Packed labels are numbers; what they mean stands in the manifest.
        self._labels, self._class_names, _ = number_classes(chunks, named=self._packed_names)
        self._labels_read = True

    def _file_labels(self, file: int) -> pa.ChunkedArray:
        """Read the labels of a file's kept rows."""
        path = str(self._files[file].as_py())
        first, last = np.searchsorted(self._file, [file, file + 1])
        numbers = self._number[first:last]
        parquet = self._open(path)
        try:
            table = patiently(
                self.filesystem,
                lambda: parquet.read_row_groups(numbers.tolist(), columns=[self._label_column]),
            )
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: the labels cannot be read: {error}") from None
        if table.num_columns == 0:
            names = ", ".join(parquet.schema_arrow.names)
            raise DataError(
                f"{path}: no column {self._label_column!r} for the labels; columns: {names}. "
                f"Set data.label_column"
            )
        column = table.column(0)
        if self._places is None:
            return column.slice(0, int(self._rows[first:last].sum()))
        sizes = [parquet.metadata.row_group(int(number)).num_rows for number in numbers]
        starts = np.repeat(_starts(sizes)[:-1], self._rows[first:last])
        places = self._places[self._starts[first] : self._starts[last]]
        return column.take(pa.array(starts + places))


def _starts(sizes: Sequence[int] | Ints) -> Ints:
    """Return where each part begins when they follow one another, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def list_parquet(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """List the Parquet files that a path means: itself, those below it, or those it matches.

    Files and folders below whose names begin with a dot or an underscore are left out.
    """
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.File:
        return [path]
    if kind == pafs.FileType.NotFound:
        return list_glob(filesystem, path)
    below = list_files(filesystem, path, (".parquet",), hidden=HIDDEN).column("path")
    return [f"{path.rstrip('/')}/{readable(name)}" for name in below.to_pylist()]
