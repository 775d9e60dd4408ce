"""Read Parquet files with a column of encoded images or of paths to images."""

import posixpath
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
from raysl.sources.columns import label_advice, no_classes, partition_values, why_no_classes
from raysl.sources.filter import RowFilter
from raysl.sources.footers import (
    Footer,
    Ints,
    manifest_footers,
    open_parquet_raw,
    read_footers,
    selection_key,
)
from raysl.sources.groups import collect_groups
from raysl.sources.labels import number_classes
from raysl.sources.lasting import is_lasting
from raysl.sources.linked import Link, read_links
from raysl.sources.manifest import Manifest
from raysl.sources.pixels import Decoding
from raysl.sources.row_group import Images, read_column, read_images, span_of
from raysl.sources.source import Encoded, Labels, SourceConfig, Unreadable, digest, reading_order
from raysl.sources.storage import (
    REMOTE_READERS,
    is_local,
    num_readers,
    relative_path,
)

_MIB = 1 << 20
_FOOTER_BYTES = 32 * _MIB  # for footers of files that are read repeatedly
_FAILURE_BYTES = 1 << 10  # size with which an unreadable row group counts in the cache


class ParquetSource:
    """Rows of Parquet files in the order of the files' names.

    A read takes the image column of whole row groups and caches it. The plan shuffles within
    windows that fit into this cache. An image that is null in the column is read from its path.

    Args:
        config: The source's settings.
        filesystem: The file system of the files.
        files: Paths of the files, sorted; with a manifest, in its order.
        window_mib: MiB of encoded images to hold for shuffling.
        manifest: Manifest written by ``raysl pack``; if given, no footers are read.
        root: Folder that row names are relative to; "" takes the common folder of all files.
        splits: Names of the folder's splits, including this one.
        notes: Notes about other content of the folder.

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
        self.splits = tuple(splits)
        self._decoding = config.decoding()
        self._label_key = config.key("label_column")
        self.weights: npt.NDArray[np.float64] | None = None
        self._root = root or posixpath.commonpath([posixpath.dirname(file) for file in files])
        order = reading_order(len(files), config.limit)
        row_filter = RowFilter(config.filter, where=config.named, key=config.key("filter"))
        ordered = [files[place] for place in order]
        footers = (
            read_footers(filesystem, ordered, config, self._root, row_filter)
            if manifest is None
            else manifest_footers(filesystem, self._root, manifest, config, order, row_filter)
        )
        numbered = zip(order, footers, strict=False)
        used_footers, groups, fingerprint = collect_groups(numbered, config.limit)
        if len(groups.rows) == 0:
            if config.filter:
                raise row_filter.nothing_left()
            raise DataError(f"{config.named}: the Parquet files hold no rows")
        self._columns = used_footers[0].columns
        selection = selection_key(config)
        self.fingerprint = digest(manifest.fingerprint if manifest else "", fingerprint, selection)
        if manifest is not None and not selection:
            self.fingerprint = manifest.fingerprint
        # One Arrow column is cheaper to send to every worker than a list of Python strings.
        self._files = pa.array([footer.path for footer in used_footers], pa.large_string())
        self._file, self._number, self._rows, self._places, self._firsts, num_bytes = groups
        self._starts = _starts(self._rows)
        per_image = max(1, num_bytes // int(self._starts[-1]))
        self.window_size: int | None = max(1, window_mib * _MIB // per_image)
        # Room for two windows: an item at their border needs row groups of both.
        self._cache: ByteCache[Images | Unreadable] = ByteCache(2 * window_mib * _MIB)
        self._footers: ByteCache[pq.FileMetaData] = ByteCache(_FOOTER_BYTES)
        self._named = next(
            (each.columns.class_names for each in used_footers if each.columns.class_names), ()
        )
        schema = next((footer.schema for footer in used_footers if footer.schema is not None), None)
        in_path = partition_values(relative_path(used_footers[0].path, self._root))
        self.label_advice = label_advice(schema, self._columns, in_path, key=self._label_key)
        self._labels: Labels | None = None
        self._class_names: list[str] = []
        self._labels_read = self._columns.label is None
        self.notes: tuple[str, ...] = (*notes, *_notes(used_footers, config), *row_filter.notes())
        self._check_label_type(schema)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_starts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _starts=_starts(state["_rows"]))

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Number of kept rows in each row group."""
        return self._rows

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the encoded images of these rows; ``Unreadable`` for those that cannot be read.

        Raises:
            DataError: If a store does not answer.
        """
        rows = np.asarray(indices, dtype=np.int64)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[groups] if self._places is None else self._places[rows]
        needed = [int(group) for group in np.unique(groups)]
        if len(needed) > 1 and not is_local(self.filesystem):
            with ThreadPoolExecutor(min(len(needed), REMOTE_READERS)) as pool:
                images = dict(zip(needed, pool.map(self._group, needed), strict=True))
        else:
            images = {group: self._group(group) for group in needed}
        encoded = {n: each.encoded for n, each in images.items() if isinstance(each, Images)}
        result: list[Encoded] = []
        links: dict[int, Link] = {}
        for group, place in zip(groups.tolist(), places.tolist(), strict=True):
            try:
                image = encoded[group][place].as_py() if group in encoded else None
            except IndexError:
                raise self._changed(group) from None
            if image is None:
                image = self._replacement(images[group], group, place)
                if isinstance(image, Link):
                    links[len(result)] = image
                    image = b""
            result.append(image)
        for number, linked in zip(
            links, read_links(self.filesystem, list(links.values())), strict=True
        ):
            result[number] = linked
        return result

    def _replacement(
        self, images: Images | Unreadable, group: int, place: int
    ) -> Unreadable | Link:
        """Return what replaces an image that is null in its row group."""
        if isinstance(images, Unreadable):
            return images
        path = None if images.paths is None else images.paths[place].as_py()
        if path is not None:
            return Link(posixpath.dirname(self._path(group)), path)
        no_path = "" if self._columns.paths in (None, self._columns.image) else " and no path"
        return Unreadable(f"null in the column {self._columns.image!r}{no_path}: no image")

    def _changed(self, group: int) -> DataError:
        return DataError(
            f"{self._path(group)} row group {self._number[group]}: has changed since the "
            f"source was opened; start the run again"
        )

    def _group(self, group: int) -> Images | Unreadable:
        return self._cache.get(group, lambda: self._read_group(group))

    def _open(self, path: str) -> pq.ParquetFile:
        """Open a file; its footer is cached for its other row groups. Errors are pyarrow's."""
        opened: list[pq.ParquetFile] = []

        def read() -> tuple[pq.FileMetaData, int]:
            opened.append(open_parquet_raw(self.filesystem, path))
            return opened[0].metadata, opened[0].metadata.serialized_size

        footer = self._footers.get(path, read)
        return opened[0] if opened else open_parquet_raw(self.filesystem, path, footer)

    def _read_group(self, group: int) -> tuple[Images | Unreadable, int]:
        path, number = self._path(group), int(self._number[group])
        where, span = f"{path} row group {number}", (0, 1)
        try:
            parquet = self._open(path)
            span = span_of(parquet.metadata, number, self._columns)
            images = read_images(self.filesystem, parquet, number, self._columns)
        except (IndexError, KeyError):
            raise self._changed(group) from None
        except (OSError, pa.ArrowException) as error:
            if not is_lasting(self.filesystem, error, path, start=span[0], count=span[1]):
                raise DataError(f"{where}: cannot be read: {error}") from None
            # Cached like a row group; otherwise each of its rows would retry the read.
            return Unreadable(f"{where} cannot be read: {error}"), _FAILURE_BYTES
        return images, images.nbytes

    def _path(self, group: int) -> str:
        return str(self._files[int(self._file[group])].as_py())

    def decoding(self, index: int) -> Decoding:
        """Return the decoding settings of the source."""
        return self._decoding

    def row_id(self, index: int) -> str:
        """Name a row FILE:ROW: its file's path below the root, and its index in the file."""
        group, row = self._place(index)
        return f"{relative_path(self._path(group), self._root)}:{row}"

    def where(self, index: int) -> str:
        """Name a row by its file, its index in the file and its row group."""
        group, row = self._place(index)
        return f"{self._path(group)} row {row} (row group {self._number[group]})"

    def _place(self, index: int) -> tuple[int, int]:
        """Return a row's group and its index among all rows of the file, kept or not."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._places is None or self._firsts is None:
            first = int(np.searchsorted(self._file, self._file[group]))
            return group, int(index - self._starts[first])
        return group, int(self._firsts[group] + self._places[index])

    def labels(self) -> Labels | None:
        """Return class numbers, -1 for null; None if there is no column of classes.

        Raises:
            DataError: If the column cannot be read.
        """
        self._read_labels()
        return self._labels

    @property
    def class_names(self) -> list[str]:
        """Class names, by number."""
        self._read_labels()
        return self._class_names

    def _check_label_type(self, schema: pa.Schema | None) -> None:
        """Add a note if the type of the label column shows that it holds no classes."""
        column = self._columns.label
        if schema is None or column is None or self._columns.label_in_path:
            return
        kind = schema.field(column).type
        first = pa.chunked_array([pa.array([], kind)])
        if pa.types.is_nested(kind):
            try:
                parquet, numbers = self._open(self._path(0)), [int(self._number[0])]
                first = read_column(self.filesystem, parquet, numbers, column)
            except (OSError, KeyError, pa.ArrowException):
                pass  # judge by the type alone; reading the images will report the error
        if why := why_no_classes(kind, first):
            self.notes += (no_classes(column, why, key=self._label_key),)
            self._labels_read = True

    def _read_labels(self) -> None:
        if self._labels_read:
            return
        with ThreadPoolExecutor(num_readers(self.filesystem)) as pool:
            columns = list(pool.map(self._file_labels, np.unique(self._file).tolist()))
        chunks = [chunk for column in columns for chunk in column.chunks]
        self._labels, self._class_names, why = number_classes(chunks, named=self._named)
        if why:
            self.notes += (no_classes(self._columns.label, why, key=self._label_key),)
        self._labels_read = True

    def _file_labels(self, file: int) -> pa.ChunkedArray:
        """Read the labels of a file's kept rows."""
        path, label = str(self._files[file].as_py()), str(self._columns.label)
        first, last = np.searchsorted(self._file, [file, file + 1])
        numbers = self._number[first:last].tolist()
        if self._columns.label_in_path:
            value = partition_values(relative_path(path, self._root))[label]
            rows = int(self._rows[first:last].sum())
            return pa.chunked_array([pa.repeat(pa.scalar(value), rows)])
        try:
            parquet = self._open(path)
            column = read_column(self.filesystem, parquet, numbers, label)
        except KeyError:
            names = ", ".join(parquet.schema_arrow.names)
            raise DataError(
                f"{path}: no column {label!r} for the labels; columns: {names}. "
                f"Set {self._label_key}"
            ) from None
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: the labels cannot be read: {error}") from None
        if self._places is None:
            return column
        sizes = [parquet.metadata.row_group(number).num_rows for number in numbers]
        starts = np.repeat(_starts(sizes)[:-1], self._rows[first:last])
        places = self._places[self._starts[first] : self._starts[last]]
        return column.take(pa.array(starts + places))


def _notes(footers: Sequence[Footer], config: SourceConfig) -> tuple[str, ...]:
    """Return notes about images that the footers show to be missing or stored elsewhere."""
    image, paths, *_ = footers[0].columns
    empty = sum(not footer.rows.sum() for footer in footers)
    notes = [f"{empty:,} of {len(footers):,} Parquet files hold no rows"] if empty else []
    if paths == image:
        notes.append(
            f"the column {image!r} holds paths, not images; the files are read, relative to the "
            f"folder of the Parquet file that names them"
        )
        return tuple(notes)
    nulls = sum(footer.nulls or 0 for footer in footers)
    fraction = f"{nulls:,} of {int(sum(footer.rows.sum() for footer in footers)):,} rows"
    if nulls and paths is not None:
        notes.append(
            f"{fraction} are null in {image!r}: their images are read from the files that "
            f"{paths!r} names, relative to the folder of the Parquet file"
        )
    elif nulls:
        notes.append(
            f"{fraction} are null in the column {image!r}, without a path: bad images; "
            f"{config.key('image_column')} selects another column"
        )
    return tuple(notes)


def _starts(sizes: Sequence[int] | Ints) -> Ints:
    """Return where each part starts after concatenation, and the total, ``(num_parts + 1,)``."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
