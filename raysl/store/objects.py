"""Read, write and list the objects below an address of a store, with patience."""

import errno
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError, RunFolderError
from raysl.folder.whole import appears_whole
from raysl.sources.storage import is_final, is_local, resolve, unreachable

T = TypeVar("T")

RETRY_S = 60.0
"""Seconds for which a request is repeated after transient errors, before an error is raised."""

_PAUSES_S = (0.5, 8.0)  # between two attempts: first, longest
_MAPPED_BYTES = 8 << 20  # smaller files are read, larger ones are mapped
_READ_BYTES = 16 << 20
# An upload to these appears at its end, and whole. Elsewhere a rename makes it so.
_WHOLE_BY_THEMSELVES = frozenset(
    ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2", "memory")
)


class Entry(NamedTuple):
    """What a listing says about an object."""

    size: int
    changed: float | None
    """Time of its last change in seconds since 1970, if the store says so."""


class Store:
    """The objects below an address, by their names relative to it.

    It can be pickled; another process finds its credentials by itself, as for ``data.source``.

    Args:
        address: An address such as ``s3://BUCKET/PATH``; see :func:`raysl.sources.storage.resolve`.
        setting: The setting that gives the address, for messages.
        retry_s: Seconds for which a request is repeated after transient errors; None takes
            ``RETRY_S``.

    Raises:
        RunFolderError: If the address cannot be resolved. The methods raise it if a request fails.
    """

    def __init__(
        self, address: str, *, setting: str = "output_dir", retry_s: float | None = None
    ) -> None:
        self.address = address.rstrip("/")
        self.setting = setting
        self.retry_s = RETRY_S if retry_s is None else retry_s
        try:
            self.filesystem, self.root = resolve(self.address, setting=setting)
        except DataError as error:
            raise RunFolderError(str(error)) from None

    def once(self) -> "Store":
        """Return the same store without retries, for work that is repeated anyway."""
        return Store(self.address, setting=self.setting, retry_s=0.0)

    def put(self, name: str, content: bytes) -> None:
        """Write an object; it appears whole."""
        self._retried(f"writing {name}", lambda: self._upload(name, pa.py_buffer(content)))

    def put_file(self, name: str, path: Path) -> None:
        """Write an object with the content of a file.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if path.stat().st_size < _MAPPED_BYTES:
            self.put(name, path.read_bytes())
            return
        # One write of the whole content: a signal cannot come between two, and closing the stream
        # after half of it would publish the half.
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
            self._retried(f"writing {name}", lambda: self._upload(name, content))

    def get(self, name: str) -> bytes | None:
        """Return the content of an object, or None if there is none."""

        def read() -> bytes:
            with self.filesystem.open_input_stream(self._path(name)) as stream:
                return bytes(stream.read())

        try:
            return self._retried(f"reading {name}", read)
        except FileNotFoundError:
            return None

    def get_file(self, name: str, path: Path) -> None:
        """Write the content of an object to a file, which appears whole.

        Raises:
            FileNotFoundError: If there is no such object.
        """

        def read() -> None:
            with (
                self.filesystem.open_input_stream(self._path(name)) as stream,
                appears_whole(path, synced=False) as temporary,
                open(temporary, "wb") as file,
            ):
                while part := stream.read(_READ_BYTES):
                    file.write(part)

        self._retried(f"reading {name}", read)

    def list(self, below: str = "", *, recursive: bool = True) -> dict[str, Entry]:
        """Return the objects below a name, by their names relative to the address."""
        folder = self._path(below) if below else self.root
        selector = pafs.FileSelector(folder, recursive=recursive, allow_not_found=True)
        infos = self._retried("listing", lambda: self.filesystem.get_file_info(selector))
        skip = len(self.root.rstrip("/")) + 1
        return {
            info.path[skip:]: Entry(
                int(info.size or 0), None if info.mtime is None else info.mtime.timestamp()
            )
            for info in infos
            if info.type == pafs.FileType.File
        }

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; missing ones are skipped."""
        for name in names:
            with suppress(FileNotFoundError):
                self._retried(
                    f"deleting {name}", partial(self.filesystem.delete_file, self._path(name))
                )

    def delete_folder(self, name: str) -> None:
        """Delete a folder and all below it; a missing one is skipped."""
        path = self._path(name)
        with suppress(FileNotFoundError):
            self._retried(f"deleting {name}", lambda: self.filesystem.delete_dir(path))

    def move_to(self, other: "Store", *, without: Iterable[str] = ()) -> None:
        """Copy all objects to another address of the same store, then delete them here."""
        names = sorted(set(self.list()) - set(without))
        for name in names:
            self._retried(f"copying {name}", partial(self._copy, name, other))
        self.delete(names)

    def _copy(self, name: str, other: "Store") -> None:
        source, target = self._path(name), other._path(name)
        if not self._is_whole_by_itself:
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        try:
            self.filesystem.copy_file(source, target)
        except (OSError, NotImplementedError):  # S3 copies at most 5 GB; this goes through here
            pafs.copy_files(source, target, self.filesystem, other.filesystem)

    def _upload(self, name: str, content: pa.Buffer) -> None:
        path = self._path(name)
        if self._is_whole_by_itself:
            self._write(path, content)
            return
        folder, _, last = path.rpartition("/")
        self.filesystem.create_dir(folder, recursive=True)
        temporary = f"{folder}/.tmp-{last}"
        self._write(temporary, content)
        self.filesystem.move(temporary, path)

    def _write(self, path: str, content: pa.Buffer) -> None:
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @property
    def _is_whole_by_itself(self) -> bool:
        scheme = self.address.partition("://")[0]
        return scheme in _WHOLE_BY_THEMSELVES and not is_local(self.filesystem)

    def _retried(self, doing: str, work: Callable[[], T]) -> T:
        """Return the result of a request; repeat it after transient errors.

        Raises:
            FileNotFoundError: At once, if there is no such object.
            RunFolderError: If it fails for good, or still after ``retry_s``.
        """
        began, pause = time.monotonic(), _PAUSES_S[0]
        while True:
            try:
                return work()
            except FileNotFoundError:
                raise
            except Exception as error:  # each package behind fsspec has exceptions of its own
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise RunFolderError(
                        f"{self.address}: the local copy cannot be written while {doing}: {error}. "
                        f"Free space, or set RAYSL_SCRATCH to a folder on a larger disk"
                    ) from None
                tried_s = time.monotonic() - began
                if is_final(error) or tried_s + pause > self.retry_s:
                    raise self._failed(doing, error, tried_s) from None
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES_S[1])

    def _failed(self, doing: str, error: Exception, tried_s: float) -> RunFolderError:
        tried = f", tried for {tried_s:.0f} s" if tried_s >= 1 else ""
        text = str(unreachable(self.address, error, setting=self.setting))
        return RunFolderError(
            f"{text}. This was {doing}{tried}; what the store holds is untouched, and the same "
            f"command resumes from it"
        )
