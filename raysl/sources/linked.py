"""Read image files whose paths are in a table."""

import os
import posixpath
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.sources.lasting import is_lasting
from raysl.sources.source import Encoded, Unreadable
from raysl.sources.storage import REMOTE_READERS, is_local, with_retries


class Link(NamedTuple):
    """A path found in a table."""

    folder: str
    """Folder of the table's file; relative paths start there."""
    path: str
    """The path as written in the table."""


def read_links(filesystem: pafs.FileSystem, links: Sequence[Link]) -> list[Encoded]:
    """Return the bytes of the linked files, or ``Unreadable`` with the reason.

    Paths are relative to the folder of their link, with forward slashes; on local disks they may be
    absolute. URLs and paths that leave the store are ``Unreadable``.

    Raises:
        DataError: If a store does not answer.
    """
    if is_local(filesystem) or len(links) < 2:
        return [_read(filesystem, link) for link in links]
    with ThreadPoolExecutor(min(len(links), REMOTE_READERS)) as pool:
        return list(pool.map(lambda link: _read(filesystem, link), links))


def _read(filesystem: pafs.FileSystem, link: Link) -> Encoded:
    on_disk = isinstance(filesystem, pafs.LocalFileSystem)
    if why := _why_unsupported(link, on_disk=on_disk):
        return Unreadable(f"its path {link.path!r} {why}")
    place = posixpath.normpath(posixpath.join(link.folder, link.path))
    try:
        if on_disk:
            return _read_from_disk(place)
        return with_retries(filesystem, lambda: _read_from_store(filesystem, place))
    except (OSError, ValueError, pa.ArrowException) as error:
        if not is_lasting(filesystem, error, place):
            raise DataError(f"{place}: cannot be read: {error}") from None
        text = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError):
            text = f"no such file (the path {link.path!r} is relative to the Parquet file's folder)"
        return Unreadable(f"{place}: {text}")


def _why_unsupported(link: Link, *, on_disk: bool) -> str:
    """Return why the file of a path cannot be read; "" if it can."""
    if not link.path:
        return "is empty"
    if "://" in link.path:
        return "is a URL; only file paths are read: download the images first"
    if on_disk:
        return ""
    if link.path.startswith("/"):
        return "is absolute; in a store, only paths relative to the Parquet file are read"
    # The first component of a path in a store is its bucket or container.
    bucket = link.folder.partition("/")[0]
    place = posixpath.normpath(posixpath.join(link.folder, link.path))
    leaves_store = place.startswith("../") or (bucket and not place.startswith(f"{bucket}/"))
    return "leads out of the store" if leaves_store else ""


def _read_from_disk(place: str) -> bytes:
    # Reading a pipe or a device would block or never end.
    if not stat.S_ISREG(os.stat(place).st_mode):
        raise ValueError("not a file")
    with open(place, "rb", buffering=0) as file:
        return file.read()


def _read_from_store(filesystem: pafs.FileSystem, place: str) -> bytes:
    with filesystem.open_input_stream(place) as stream:
        return bytes(stream.read())
