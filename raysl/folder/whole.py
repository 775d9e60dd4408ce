"""Files and folders that appear complete or not at all: written beside, synced, renamed.

What is being written has a name that begins with :data:`UNFINISHED`, so that no one takes it for
whole. A rename is one step for whoever looks, whether processes are killed, the disk is full or the
machine stops.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

UNFINISHED = ".tmp-"
"""How the names begin of what is not whole yet, or not any more."""


@contextmanager
def appears_whole(
    path: Path, *, shared: bool = False, synced: bool = True, lasting: bool = False
) -> Iterator[Path]:
    """Give a place beside ``path`` to write to; what is there at the end takes its name.

    Whatever goes wrong inside, a full disk too, leaves ``path`` as it was and nothing beside it. A
    process that is killed leaves something unfinished: the next one of its kind replaces it, or,
    where it is shared, :func:`clear_unfinished` removes it.

    Args:
        path: A file, or a folder. A folder that is there already is exchanged as a whole.
        shared: Others may write the same at the same time, such as a process that is thought dead:
            each has a place of its own, and the last one to end wins.
        synced: Bring the content to the disk before it gets its name. Not for what is quickly
            made again, such as pictures.
        lasting: Bring the name to the disk too, for whoever gives up something else for it.

    Yields:
        Where to write; a folder has to be made. Its name ends as that of ``path`` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whose = f"{os.getpid()}-{threading.get_ident()}-" if shared else ""
    temporary = path.with_name(f"{UNFINISHED}{whose}{path.name}")
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
    """Rename what is to be deleted, so that a folder half deleted is not taken for whole.

    Returns:
        Its name until it is deleted, or :func:`clear_unfinished` does so.
    """
    aside = path.with_name(f"{UNFINISHED}old-{path.name}")
    _remove(aside)
    path.rename(aside)
    return aside


def clear_unfinished(folder: Path) -> None:
    """Delete what processes that were killed left in a folder to which only the caller writes."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        _try_to_remove(leftover)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file so that it is either old or new, never half."""
    with appears_whole(path, shared=True) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a small file, as UTF-8, so that it is either old or new, never half."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is either old or new."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object, or None if it is not there or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
