"""Read images that a table refers to by path."""

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
from raysl.sources.storage import REMOTE_READERS, is_local, patiently


class Link(NamedTuple):
    """A path found in a table."""

    folder: str
    """The folder of the table's file; relative paths start there."""
    path: str


def read_links(filesystem: pafs.FileSystem, links: Sequence[Link]) -> list[Encoded]:
    """Return the bytes of the linked files, or the reason why there are none.

    Paths are relative to the folder, with forward slashes; on local disks they may be absolute.
    URLs and paths outside of the file system become ``Unreadable``.

    Raises:
        DataError: If a store does not answer.
    """
    if is_local(filesystem) or len(links) < 2:
        return [_read(filesystem, link) for link in links]
    with ThreadPoolExecutor(min(len(links), REMOTE_READERS)) as pool:
        return list(pool.map(lambda link: _read(filesystem, link), links))


def _read(filesystem: pafs.FileSystem, link: Link) -> Encoded:
    on_disk = isinstance(filesystem, pafs.LocalFileSystem)
    if why := _out_of_reach(link, on_disk=on_disk):
        return Unreadable(f"its path {link.path!r} {why}")
    place = posixpath.normpath(posixpath.join(link.folder, link.path))
    try:
        if on_disk:
            return _read_from_disk(place)
        return patiently(filesystem, lambda: _read_from_store(filesystem, place))
    except (OSError, ValueError, pa.ArrowException) as error:
        if not is_lasting(filesystem, error, place):
            raise DataError(f"{place}: cannot be read: {error}") from None
        text = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError):
            text = f"no such file (the path {link.path!r} is taken from the Parquet file's folder)"
        return Unreadable(f"{place}: {text}")


def _out_of_reach(link: Link, *, on_disk: bool) -> str:
    """Return why a path cannot be followed; "" if it can."""
    if not link.path:
        return "is empty"
    if "://" in link.path:
        return "is a URL; only paths of files beside the table are read: download the images first"
    if on_disk:
        return ""
    if link.path.startswith("/"):
        return "is absolute; in a store, only paths relative to the Parquet file are read"
    # The first component of a path in a store is its bucket or container.
    bucket = link.folder.partition("/")[0]
    place = posixpath.normpath(posixpath.join(link.folder, link.path))
    out = place.startswith("../") or (bucket and not place.startswith(f"{bucket}/"))
    return "leads out of the store" if out else ""


def _read_from_disk(place: str) -> bytes:
    # Reading a pipe or a device would block or never end.
    if not stat.S_ISREG(os.stat(place).st_mode):
        raise ValueError("not a file")
    with open(place, "rb", buffering=0) as file:
        return file.read()


def _read_from_store(filesystem: pafs.FileSystem, place: str) -> bytes:
    with filesystem.open_input_stream(place) as stream:
        return bytes(stream.read())
