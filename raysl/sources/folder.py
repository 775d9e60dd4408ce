"""A folder of image files, in class folders or not."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.sources.filter import Condition, keep
from raysl.sources.labels import number_classes
from raysl.sources.pixels import Decoding
from raysl.sources.source import (
    IMAGE_SUFFIXES,
    Encoded,
    Labels,
    SourceConfig,
    digest,
    spread_rows,
)
from raysl.sources.storage import REMOTE_READERS, is_local, list_files, read_file, readable


class FolderSource:
    """Image files below a folder, sorted by path; the first folder level names the class.

    It takes some tens of bytes a file: the paths are one Arrow column.

    Args:
        config: What to open.
        filesystem: Where the folder lies.
        images: What lies in it, as ``list_images`` returns it.
        root: The folder.

    Raises:
        DataError: If the filter leaves no image.
    """

    def __init__(
        self, config: SourceConfig, filesystem: pafs.FileSystem, images: pa.Table, root: str
    ) -> None:
        self.name = config.source
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        if config.filter:
            where = f"data.source={self.name}"
            images = images.filter(pa.array(files_kept(images, config.filter, where=where)))
            if images.num_rows == 0:
                raise DataError(f"{where}: data.filter leaves no image")
        images = images.take(spread_rows(images.num_rows, config.limit)).combine_chunks()
        self._paths = _one_chunk(images.column("path"))
        self.fingerprint = digest(*_buffers(self._paths), images.column("bytes").to_numpy().data)
        self.window_size = None
        self.notes: tuple[str, ...] = ()
        self.splits: tuple[str, ...] = ()
        self.label_advice = "put the images into folders, one a class"
        self._decoding = config.decoding()
        self.weights: npt.NDArray[np.float64] | None = None
        self.class_names: list[str] = []
        self._labels: Labels | None = None
        folders = pc.struct_field(pc.extract_regex(self._paths, "^(?P<folder>[^/]+)/"), "folder")
        if folders.null_count == 0:
            labels, names, _ = number_classes([folders])
            assert labels is not None  # folders have names
            if len(names) > 1:
                # Class numbers are few: a byte or two a file on the way to the workers.
                self._labels = labels.astype(np.min_scalar_type(len(names)))
                self.class_names = names

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Any file is as quick to read as any other."""
        return np.array([len(self._paths)], dtype=np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the bytes of these files.

        Raises:
            DataError: If one cannot be read.
        """
        if is_local(self.filesystem):
            return [self._read_one(int(index)) for index in indices]
        with ThreadPoolExecutor(REMOTE_READERS) as pool:
            return list(pool.map(self._read_one, (int(index) for index in indices)))

    def _read_one(self, index: int) -> bytes:
        return read_file(self.filesystem, self._path(index))

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
        """Return the number of each file's class folder, or None if there are not two classes."""
        return None if self._labels is None else self._labels.astype(np.int64)


def list_images(filesystem: pafs.FileSystem, root: str) -> pa.Table:
    """List the image files below a folder, sorted by path; hidden ones are left out.

    Returns:
        Columns ``path``, relative to ``root``, and ``bytes``.
    """
    return list_files(filesystem, root, IMAGE_SUFFIXES)


def files_kept(
    files: pa.Table, conditions: Sequence[Condition], *, where: str
) -> npt.NDArray[np.bool_]:
    """Return which files fulfil all conditions, ``(num_files,)``.

    Args:
        files: ``path`` (large_binary) and ``bytes``: the columns that conditions may ask for.
        conditions: All must hold.
        where: Name of the source for the error message.

    Raises:
        DataError: If a condition is of another column or does not fit it.
    """
    texts = pa.array([readable(path) for path in files.column("path").to_pylist()], pa.string())
    return keep(files.set_column(0, "path", texts), conditions, where=where)


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
