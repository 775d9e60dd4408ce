"""A folder of image files, in class folders or not."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from raysl.augment.crop import Image
from raysl.data.source import IMAGE_SUFFIXES, Labels, SourceConfig, digest
from raysl.errors import DataError

# Reads of object stores wait for the network, not for the CPU.
_REMOTE_READERS = 16


class FolderSource:
    """Image files below a folder, sorted by path; the first folder level names the class.

    Args:
        config: What to open.
        filesystem: Where the folder lies.
        files: What lies in it, as ``list_images`` returns it.
        root: The folder.
    """

    def __init__(
        self,
        config: SourceConfig,
        filesystem: pafs.FileSystem,
        files: Sequence[pafs.FileInfo],
        root: str,
    ) -> None:
        self.name = config.source
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        files = files[: config.limit]
        # A million paths as one Arrow column, not as a million Python strings to pickle.
        self._paths = pa.array([info.path[len(self.root) + 1 :] for info in files])
        self.fingerprint = digest(*(f"{f.path[len(self.root) :]}:{f.size}\n" for f in files))
        self.window_size = None
        self.class_names: list[str] = []
        self._labels: Labels | None = None
        firsts = [path.split("/")[0] if "/" in path else None for path in self._paths.to_pylist()]
        if None not in firsts:
            self.class_names = sorted({first for first in firsts if first is not None})
        if len(self.class_names) > 1:
            numbers = {name: number for number, name in enumerate(self.class_names)}
            self._labels = np.array([numbers[first or ""] for first in firsts], dtype=np.int64)
        else:
            self.class_names = []

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Any file is as quick to read as any other."""
        return np.array([len(self._paths)], dtype=np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[bytes | Image]:
        """Return the bytes of these files."""
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            return [self._read_one(int(index)) for index in indices]
        with ThreadPoolExecutor(_REMOTE_READERS) as pool:
            return list(pool.map(self._read_one, (int(index) for index in indices)))

    def _read_one(self, index: int) -> bytes:
        path = f"{self.root}/{self._paths[index].as_py()}"
        try:
            with self.filesystem.open_input_stream(path) as stream:
                return bytes(stream.read())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None

    def where(self, index: int) -> str:
        """Name a row by its file."""
        return f"{self.root}/{self._paths[index].as_py()}"

    def labels(self) -> Labels | None:
        """Return the number of each file's class folder, or None if there are not two classes."""
        return self._labels


def list_images(filesystem: pafs.FileSystem, root: str) -> list[pafs.FileInfo]:
    """List the image files below a folder, sorted by path; hidden ones are left out."""
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    images = [
        info
        for info in found
        if info.type == pafs.FileType.File
        and info.path.lower().endswith(IMAGE_SUFFIXES)
        and not any(part.startswith(".") for part in info.path[len(root) :].split("/"))
    ]
    return sorted(images, key=lambda info: str(info.path))
