"""Write files and folders atomically: to a temporary name, synced, then renamed.

A temporary name begins with :data:`UNFINISHED`, by which readers skip it. A rename is atomic for
every reader, even if a process is killed, the disk is full or the machine stops.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raysl.errors import RunFolderError

UNFINISHED = ".tmp-"
"""Prefix of the names of files and folders that are being written or deleted."""


@contextmanager
def appears_whole(
    path: Path, *, shared: bool = False, synced: bool = True, lasting: bool = False
) -> Iterator[Path]:
    """Provide a temporary path beside ``path``, and rename it to ``path`` at the end.

    An error in the block, such as a full disk, leaves ``path`` as it was and removes the temporary
    path. A killed process leaves its temporary path: the next write replaces it, or, if ``shared``,
    :func:`clear_unfinished` removes it.

    Args:
        path: A file or a folder. An existing folder is replaced as a whole.
        shared: Other processes may write the same path at the same time: each gets a temporary
            path of its own, and the last one to finish wins.
        synced: Sync the content to disk before the rename. Not needed for files that are cheap to
            recreate, such as pictures.
        lasting: Also sync the parent folder, for callers that afterwards delete older files.

    Yields:
        The temporary path, with the suffix of ``path``. For a folder, the caller creates it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-{threading.get_ident()}-" if shared else ""
    temporary = path.with_name(f"{UNFINISHED}{writer}{path.name}")
    _remove(temporary)
    try:
        yield temporary
        if synced:
            for file in _files(temporary):
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
    except BaseException:
        _try_to_remove(temporary)
        raise
    try:
        _take_name(temporary, path, lasting=lasting)
    except OSError:
        _try_to_remove(temporary)
        raise


def _take_name(temporary: Path, path: Path, *, lasting: bool) -> None:
    older = None
    if temporary.is_dir():
        older = give_up_name(path) if path.exists() else None
        temporary.rename(path)
    else:
        temporary.replace(path)
    if lasting:
        _sync_folder(path.parent)
    if older is not None:
        _remove(older)


def give_up_name(path: Path) -> Path:
    """Rename a folder before its deletion, so that no reader sees a partly deleted folder.

    Returns:
        The temporary path; :func:`clear_unfinished` removes it if the caller is killed first.
    """
    aside = path.with_name(f"{UNFINISHED}old-{path.name}")
    _remove(aside)
    path.rename(aside)
    return aside


def clear_unfinished(folder: Path) -> None:
    """Delete the temporary files and folders that killed processes left in a folder.

    No other process may write to the folder meanwhile.
    """
    for leftover in folder.glob(f"{UNFINISHED}*"):
        _try_to_remove(leftover)


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Raise errors of the disk in the block as RunFolderError, which names the file and the remedy.

    Args:
        path: The file or folder that is written.
    """
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{error.filename or path}: cannot be written: {error.strerror or error}; free space, "
            f"then run the same command"
        ) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with appears_whole(path, shared=True) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file is missing or damaged."""
    try:
        return json_object(path.read_bytes())
    except OSError:
        return None


def json_object(line: bytes | str) -> dict[str, Any] | None:
    """Return the object in a line of JSON; None for a cut line or another kind of value."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _try_to_remove(path: Path) -> None:
    with suppress(OSError):
        _remove(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
