"""Read a folder of image files, with or without class folders."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from raysl.errors import DataError, counted
from raysl.sources.filter import RowFilter
from raysl.sources.labels import number_classes
from raysl.sources.lasting import is_lasting
from raysl.sources.pixels import Decoding
from raysl.sources.source import (
    Encoded,
    Labels,
    SourceConfig,
    Unreadable,
    digest,
    refuse_columns,
    spread_rows,
)
from raysl.sources.storage import (
    REMOTE_READERS,
    is_local,
    read_bytes,
    readable,
    why_unread,
)


class ClassFolders(NamedTuple):
    """Which folders in the paths of images are classes."""

    above: tuple[str, ...] = ("",)
    """Parent folders of the class folders, with a trailing slash; "" is the root."""
    are_classes: bool = True
    """False if there are no class folders."""


class FolderSource:
    """Image files below a folder, sorted by path; the first folder level names the class.

    An image beside the class folders has no label. The paths are one Arrow column, which takes some
    tens of bytes per file.

    Args:
        config: The source's settings.
        filesystem: The file system of the folder.
        images: Table of ``path``, relative to ``root``, and ``bytes``, sorted by path.
        root: Path of the folder.
        classes: Which folders are classes.
        splits: Names of the folder's splits, including this one.
        notes: Notes about other content of the folder.

    Raises:
        DataError: If the filter leaves no image.
    """

    def __init__(
        self,
        config: SourceConfig,
        filesystem: pafs.FileSystem,
        images: pa.Table,
        root: str,
        *,
        classes: ClassFolders = ClassFolders(),  # noqa: B008 (immutable)
        splits: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        refuse_columns(config, "a folder of image files")
        self.name = config.source
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.splits = tuple(splits)
        self.notes: tuple[str, ...] = tuple(notes)
        self.label_advice = "put the images into folders, one per class"
        self._decoding = config.decoding()
        if config.filter:
            filtered = RowFilter(config.filter, where=config.named, key=config.key("filter"))
            images = images.filter(pa.array(_selected_files(images, filtered)))
            if images.num_rows == 0:
                raise filtered.nothing_left()
            self.notes += filtered.notes()
        images = images.take(spread_rows(images.num_rows, config.limit)).combine_chunks()
        self._paths = _one_chunk(images.column("path"))
        self.fingerprint = digest(*_buffers(self._paths), images.column("bytes").to_numpy().data)
        self.window_size = None
        self.weights: npt.NDArray[np.float64] | None = None
        self.class_names: list[str] = []
        self._labels: Labels | None = None
        if classes.are_classes:
            self._name_classes(classes)

    def _name_classes(self, classes: ClassFolders) -> None:
        above = "|".join(re.escape(folder) for folder in classes.above)
        matches = pc.extract_regex(self._paths, f"^(?:{above})(?P<folder>[^/]+)/")
        folders = pc.struct_field(matches, "folder")
        labels, names, _ = number_classes([folders])
        assert labels is not None  # every folder has a name
        if not names:
            return
        # There are few classes: one or two bytes per file keep pickles small.
        self._labels = labels.astype(np.min_scalar_type(-len(names)))
        self.class_names = names
        if beside := int((labels < 0).sum()):
            self.notes += (f"{counted(beside, 'image')} beside the class folders, without a label",)

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """One group of all files: they are read one by one."""
        return np.array([len(self._paths)], dtype=np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the bytes of the files of these rows.

        Raises:
            DataError: If a store does not answer.
        """
        if is_local(self.filesystem):
            return [self._read_one(int(index)) for index in indices]
        with ThreadPoolExecutor(REMOTE_READERS) as pool:
            return list(pool.map(self._read_one, (int(index) for index in indices)))

    def _read_one(self, index: int) -> Encoded:
        try:
            return read_bytes(self.filesystem, self._path(index))
        except (OSError, pa.ArrowException) as error:
            if is_lasting(self.filesystem, error, self.where(index)):
                return Unreadable(why_unread(error))
            raise DataError(f"{self.where(index)}: {why_unread(error)}") from None

    def _path(self, index: int) -> bytes:
        return os.fsencode(self.root) + b"/" + bytes(self._paths[index].as_py())

    def decoding(self, index: int) -> Decoding:
        """Return the decoding settings of the source."""
        return self._decoding

    def row_id(self, index: int) -> str:
        """Return the path of a row's file below the folder."""
        return readable(self._paths[index].as_py())

    def where(self, index: int) -> str:
        """Return the path of a row's file."""
        return readable(self._path(index))

    def labels(self) -> Labels | None:
        """Return each file's class number, -1 outside of class folders; None without classes."""
        return None if self._labels is None else self._labels.astype(np.int64)


def _selected_files(files: pa.Table, conditions: RowFilter) -> npt.NDArray[np.bool_]:
    """Return which files fulfil all conditions, ``(num_files,)``; a file's row_id is its path."""
    texts = pa.array([readable(path) for path in files.column("path").to_pylist()], pa.string())
    return conditions.keep(files.set_column(0, "path", texts).append_column("row_id", texts))


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Copy a column to one array without unused rows, so that its pickle is small."""
    return pa.concat_arrays([pa.array([], column.type), *column.chunks])


def _buffers(paths: pa.Array) -> tuple[memoryview, memoryview]:
    """Return the lengths of the paths, and the bytes of all paths concatenated."""
    if len(paths) == 0:
        return memoryview(b""), memoryview(b"")
    _, offsets, values = paths.buffers()
    ends = np.frombuffer(offsets, np.int64)[paths.offset : paths.offset + len(paths) + 1]
    return np.diff(ends).data, memoryview(values)[int(ends[0]) : int(ends[-1])]
