"""Access local disks and object stores in the same way: resolve a URI, list files, read bytes."""

import errno
import fnmatch
import importlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from raysl.errors import DataError

T = TypeVar("T")

HIDDEN = "._"
"""Prefixes of files that tools leave beside data: .crc, _SUCCESS, _temporary."""

# Reads from object stores spend their time waiting, so many threads help; few saturate a disk.
REMOTE_READERS = 16
LOCAL_READERS = 4

# Schemes that pyarrow handles; fsspec handles the others.
_NATIVE = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
_PACKAGES = {"az": "adlfs", "adl": "adlfs", "hf": "huggingface_hub", "oci": "ocifs", "oss": "ossfs"}
_HELP = {
    "s3": "Check the bucket, the network and the credentials (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or ~/.aws); AWS_ENDPOINT_URL names a store other than AWS",
    "gs": "Check the bucket, the network and the credentials (GOOGLE_APPLICATION_CREDENTIALS, or "
    "gs://anonymous@BUCKET/... for a public one)",
    "abfs": "Write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH and check the credentials "
    "(AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or az login)",
    "hdfs": "Check JAVA_HOME, HADOOP_HOME, CLASSPATH and the name node's address",
    "az": "Check the container and AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_HELP |= {"gcs": _HELP["gs"], "abfss": _HELP["abfs"], "viewfs": _HELP["hdfs"]}
_LONGEST_ERROR = 400
_GCS_RETRY_LIMIT_S = 15  # pyarrow's default is 15 minutes

_PAUSES_S = (0.5, 2.0, 5.0)
# Words in the messages of errors that a retry cannot fix.
_FINAL = re.compile("ACCESS_DENIED|NO_SUCH|INVALID_|SIGNATURE|NOT_FOUND|PERMISSION|UNAUTHENTICATED")


def resolve(uri: str, *, setting: str = "data.source") -> tuple[pafs.FileSystem, str]:
    """Return the pyarrow file system and the path of a local path or a URI.

    pyarrow handles ``s3://BUCKET/PATH``, ``gs://``,
    ``abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH``, ``hdfs://`` and ``file://``; fsspec
    handles ``az://CONTAINER/PATH`` and every other scheme, if the required package is installed.
    Credentials are found as by each store's own tools. For S3, ``AWS_ENDPOINT_URL``
    or ``AWS_ENDPOINT_URL_S3`` in the environment selects a compatible store such as MinIO; the file
    system takes this setting to the workers. The path is literal, including spaces and wildcards;
    only after ``file://`` does %20 mean a space.

    Args:
        uri: A local path or a URI.
        setting: The setting that gives it, for messages.

    Raises:
        DataError: If the scheme is unknown, its package is missing, or the store cannot be reached.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        if scheme not in _NATIVE:
            return _from_fsspec(uri)
        if scheme == "file":
            return pafs.FileSystem.from_uri(uri.replace(" ", "%20"))  # type: ignore[no-any-return]
        place, _, path = rest.partition("/")
        # A question mark starts the store's settings, or is part of a glob.
        path, _, settings = path.rpartition("?") if re.search(r"\?\w+=", path) else (path, "", "")
        place, _, more = place.partition("?")
        settings = settings or more
        if scheme in ("gs", "gcs") and "retry_limit_seconds" not in settings:
            settings += f"{'&' if settings else ''}retry_limit_seconds={_GCS_RETRY_LIMIT_S}"
        address = f"{scheme}://{place}" + (f"?{settings}" if settings else "")
        filesystem, base = pafs.FileSystem.from_uri(address)
        return filesystem, f"{base.rstrip('/')}/{path}" if path else base.rstrip("/") or "/"
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        hint = f". Install it: pip install {package}" if package else ""
        raise DataError(f"{setting}={uri}: {error}{hint}") from None
    except (ValueError, OSError, pa.ArrowException) as error:
        raise unreachable(uri, error, setting=setting) from None


def _from_fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    # Imported lazily: most sources do not need fsspec.
    core = importlib.import_module("fsspec.core")
    filesystem, path = core.url_to_fs(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), str(path).rstrip("/")


def unreachable(uri: str, error: Exception, *, setting: str = "data.source") -> DataError:
    """Build the error for a place that cannot be opened, with advice on what to check."""
    hint = _HELP.get(uri.partition("://")[0], "") if "://" in uri else ""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_ERROR:  # libhdfs lists every place where it looked for Java
        text = text[:_LONGEST_ERROR] + " ..."
    return DataError(f"{setting}={uri}: " + (f"{text.rstrip('.')}. {hint}" if hint else text))


def is_local(filesystem: pafs.FileSystem) -> bool:
    """Return whether a file system is on this machine."""
    if isinstance(filesystem, pafs.SubTreeFileSystem):
        return is_local(filesystem.base_fs)
    return isinstance(filesystem, pafs.LocalFileSystem)


def num_readers(filesystem: pafs.FileSystem) -> int:
    """Return how many threads should read from a file system in parallel."""
    return LOCAL_READERS if is_local(filesystem) else REMOTE_READERS


def with_retries(filesystem: pafs.FileSystem, read: Callable[[], T]) -> T:
    """Call ``read``; on an object store, retry after a transient error.

    Raises:
        OSError: The error of the last attempt. Errors of a local disk and lasting errors, such as a
            missing object or permission, are raised without a retry.
    """
    for pause in () if is_local(filesystem) else _PAUSES_S:
        try:
            return read()
        except OSError as error:
            if is_final(error):
                raise
        time.sleep(pause)
    return read()


def is_final(error: Exception) -> bool:
    """Return whether an error of a store would also occur on a later attempt."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError)
    return isinstance(error, kinds) or bool(_FINAL.search(str(error)))


def read_file(filesystem: pafs.FileSystem, path: str | bytes) -> bytes:
    """Return the bytes of a file.

    Args:
        filesystem: The file system of the file.
        path: Path of the file; bytes for a local name that is not UTF-8.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return read_bytes(filesystem, path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{readable(path)}: {why_unread(error)}") from None


def read_bytes(filesystem: pafs.FileSystem, path: str | bytes) -> bytes:
    """Return the bytes of a file, as :func:`read_file` does, but raise the original error.

    Raises:
        OSError, ArrowException: If it cannot be read; :func:`raysl.sources.lasting.is_lasting` says
            whether another attempt could help.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        with open(path, "rb", buffering=0) as file:
            return file.read()
    name = readable(path)

    def read() -> bytes:
        with filesystem.open_input_stream(name) as stream:
            return bytes(stream.read())

    return with_retries(filesystem, read)


def why_unread(error: Exception) -> str:
    """Describe a read error in words."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read: {reason}"


def relative_path(path: str, root: str) -> str:
    """Return a file's path relative to a folder."""
    return path.removeprefix(root.rstrip("/") + "/")


def readable(path: str | bytes) -> str:
    r"""Return a path as printable text; bytes that are not UTF-8 become escapes such as \xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


def list_files(
    filesystem: pafs.FileSystem, root: str, suffixes: Sequence[str], *, hidden: str = "."
) -> pa.Table:
    """List the files below a folder recursively, sorted by path.

    Args:
        filesystem: The file system of the folder.
        root: Path of the folder.
        suffixes: Suffixes of the files to list, in lower case; they match names in any case.
        hidden: Names below ``root`` that start with one of these characters are skipped.

    Returns:
        Table of ``path``: large_binary, relative to ``root`` (local names need not be UTF-8), and
        ``bytes``: int64, the size of the file.

    Raises:
        DataError: If a folder cannot be listed.
    """
    # One Arrow table per folder: a million files should not become a million Python objects.
    if isinstance(filesystem, pafs.LocalFileSystem):
        parts = _list_local(root, suffixes, hidden)
    else:
        parts = _list_remote(filesystem, root, suffixes, hidden)
    schema = pa.schema([("path", pa.large_binary()), ("bytes", pa.int64())])
    table = pa.concat_tables([schema.empty_table(), *parts]).combine_chunks()
    return table.take(pc.sort_indices(table.column("path"))).combine_chunks()


def list_glob(filesystem: pafs.FileSystem, pattern: str) -> list[str]:
    """Return the paths that match a path with ``*``, ``?`` or ``[...]``, sorted.

    Wildcards also match slashes. Hidden names (``HIDDEN``) are skipped.
    """
    root, files = match_glob(filesystem, pattern)
    return [f"{root}/{readable(name)}" for name in files.column("path").to_pylist()]


def match_glob(filesystem: pafs.FileSystem, pattern: str) -> tuple[str, pa.Table]:
    """Return a glob's folder, and a table of the matching files as ``list_files`` returns it."""
    root, rest = existing_part(filesystem, pattern)
    if not any(sign in rest for sign in "*?["):
        return root, _table([], [])
    files = list_files(filesystem, root, ("",), hidden=HIDDEN)
    match = [fnmatch.fnmatchcase(readable(name), rest) for name in files.column("path").to_pylist()]
    return root, files.filter(pa.array(match, pa.bool_())).combine_chunks()


def existing_part(filesystem: pafs.FileSystem, pattern: str) -> tuple[str, str]:
    """Split a path into the folder above its first component with wildcards, and the rest.

    If a folder exists, wildcards in its name are literal: "set [2020]".
    """
    parts = pattern.split("/")
    number = 0
    while number < len(parts) - 1:
        folder = "/".join(parts[: number + 1])
        signs = any(sign in parts[number] for sign in "*?[{")
        if signs and filesystem.get_file_info(folder).type != pafs.FileType.Directory:
            break
        number += 1
    root, rest = "/".join(parts[:number]), "/".join(parts[number:])
    if filesystem.get_file_info(root or "/").type != pafs.FileType.Directory:
        return root, ""
    return root, rest


def file_table(names: Sequence[str]) -> pa.Table:
    """Return the named files in their order as a table like that of ``list_files``, sizes 0."""
    return _table([os.fsencode(name) for name in names], [0] * len(names))


def _table(paths: list[bytes], sizes: list[int]) -> pa.Table:
    columns = [pa.array(paths, pa.large_binary()), pa.array(sizes, pa.int64())]
    return pa.table(columns, names=["path", "bytes"])


class _Folder(NamedTuple):
    path: bytes
    prefix: bytes  # path relative to the root, with a trailing slash
    link_targets: frozenset[bytes]  # folders entered through links, to detect cycles


def _list_local(root: str, suffixes: Sequence[str], hidden: str) -> Iterable[pa.Table]:
    endings = tuple(suffix.encode() for suffix in suffixes)
    top = os.fsencode(root)
    level = [_Folder(top, b"", frozenset([os.path.realpath(top)]))]
    with ThreadPoolExecutor(2 * LOCAL_READERS) as pool:
        while level:
            subfolders: list[_Folder] = []
            for table, folders in pool.map(lambda f: _scan(f, endings, hidden.encode()), level):
                subfolders += folders
                yield table
            level = subfolders


def _scan(
    folder: _Folder, endings: tuple[bytes, ...], hidden: bytes
) -> tuple[pa.Table, list[_Folder]]:
    paths: list[bytes] = []
    sizes: list[int] = []
    folders: list[_Folder] = []
    try:
        with os.scandir(folder.path) as entries:
            for entry in entries:
                if entry.name[:1] in hidden:
                    continue
                if entry.is_dir():
                    folders += _enter(folder, entry)
                elif entry.name.lower().endswith(endings) and (size := _size(entry)) is not None:
                    paths.append(folder.prefix + entry.name)
                    sizes.append(size)
    except OSError as error:
        raise DataError(f"{readable(folder.path)}: cannot be listed: {error.strerror}") from None
    return _table(paths, sizes), folders


def _enter(folder: _Folder, entry: os.DirEntry[bytes]) -> list[_Folder]:
    """Return the subfolder of an entry; [] for a link that leads back into a cycle."""
    link_targets = folder.link_targets
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        above = os.path.realpath(folder.path) + b"/"
        if target in link_targets or above.startswith(target + b"/"):
            return []
        link_targets |= {target}
    return [_Folder(entry.path, folder.prefix + entry.name + b"/", link_targets)]


def _size(entry: os.DirEntry[bytes]) -> int | None:
    """Return the size of a regular file, following links; None if it is not one or was deleted.

    A dangling link counts as a file of zero bytes, so that a read reports the error.
    """
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return 0 if entry.is_symlink() else None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _list_remote(
    filesystem: pafs.FileSystem, root: str, suffixes: Sequence[str], hidden: str
) -> Iterable[pa.Table]:
    skip = len(root.rstrip("/")) + 1
    endings = tuple(suffixes)

    def list_folder(folder: str, *, recursive: bool) -> tuple[pa.Table, list[str]]:
        selector = pafs.FileSelector(folder, recursive=recursive)
        try:
            infos = with_retries(filesystem, lambda: filesystem.get_file_info(selector))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{folder}: cannot be listed: {error}") from None
        paths, sizes, folders = [], [], []
        for info in infos:
            name = info.path[skip:]
            if any(part[:1] in hidden for part in name.split("/") if part):
                continue
            if info.type == pafs.FileType.Directory:
                folders.append(info.path)
            elif info.type == pafs.FileType.File and name.lower().endswith(endings):
                paths.append(name.encode())
                sizes.append(int(info.size or 0))
        return _table(paths, sizes), folders

    # A store returns a thousand names per request, so many folders are listed in parallel.
    table, folders = list_folder(root, recursive=False)
    yield table
    with ThreadPoolExecutor(REMOTE_READERS) as pool:
        yield from (t for t, _ in pool.map(lambda f: list_folder(f, recursive=True), folders))
