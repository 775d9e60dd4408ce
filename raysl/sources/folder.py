"""A folder of image files, in class folders or not."""

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
    """Where the names of classes stand in the paths of images."""

    above: tuple[str, ...] = ("",)
    """Folders, with a slash behind, whose folders are classes; an empty text is the root."""
    are_classes: bool = True
    """Whether those folders are classes at all."""


class FolderSource:
    """Image files below a folder, sorted by path; the first folder level names the class.

    An image that lies beside the class folders has no label. It takes some tens of bytes a file:
    the paths are one Arrow column.

    Args:
        config: What to open.
        filesystem: Where the folder lies.
        images: ``path``, relative to ``root``, and ``bytes`` of its files, sorted by path.
        root: The folder.
        classes: Which level of folders names the class.
        splits: That lie in the folder, the one of these images among them.
        notes: What lies there besides.

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
        self.label_advice = "put the images into folders, one a class"
        self._decoding = config.decoding()
        if config.filter:
            filtered = RowFilter(config.filter, where=f"data.source={self.name}")
            images = images.filter(pa.array(_files_kept(images, filtered)))
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
        found = pc.extract_regex(self._paths, f"^(?:{above})(?P<folder>[^/]+)/")
        folders = pc.struct_field(found, "folder")
        labels, names, _ = number_classes([folders])
        assert labels is not None  # folders have names
        if not names:
            return
        # Class numbers are few: a byte or two a file on the way to the workers.
        self._labels = labels.astype(np.min_scalar_type(-len(names)))
        self.class_names = names
        if beside := int((labels < 0).sum()):
            self.notes += (f"{counted(beside, 'image')} beside the class folders, without a label",)

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Any file is as quick to read as any other."""
        return np.array([len(self._paths)], dtype=np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the bytes of these files.

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
        """Return what the source's settings say of its files."""
        return self._decoding

    def row_id(self, index: int) -> str:
        """Name a row by its path below the folder."""
        return readable(self._paths[index].as_py())

    def where(self, index: int) -> str:
        """Name a row by its file."""
        return readable(self._path(index))

    def labels(self) -> Labels | None:
        """Return the number of each file's class folder, -1 for a file in none, or None."""
        return None if self._labels is None else self._labels.astype(np.int64)


def _files_kept(files: pa.Table, conditions: RowFilter) -> npt.NDArray[np.bool_]:
    """Return which files fulfil all conditions, ``(num_files,)``; the id of a file is its path."""
    texts = pa.array([readable(path) for path in files.column("path").to_pylist()], pa.string())
    return conditions.keep(files.set_column(0, "path", texts).append_column("row_id", texts))


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array that holds its own rows only, so that it pickles small."""
    return pa.concat_arrays([pa.array([], column.type), *column.chunks])


def _buffers(paths: pa.Array) -> tuple[memoryview, memoryview]:
    """Return the lengths of the paths, and all of them one after another."""
    if len(paths) == 0:
        return memoryview(b""), memoryview(b"")
    _, offsets, values = paths.buffers()
    ends = np.frombuffer(offsets, np.int64)[paths.offset : paths.offset + len(paths) + 1]
    return np.diff(ends).data, memoryview(values)[int(ends[0]) : int(ends[-1])]
