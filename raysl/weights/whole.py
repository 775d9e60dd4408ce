"""Write files and folders atomically."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Provide a temporary path to write to, and rename it to ``path`` at the end.

    Any error in the block, including a full disk, leaves ``path`` as it was, and nothing beside it.
    A killed process leaves a hidden file, which the next one of its kind replaces.

    Args:
        path: A file, or a folder. An existing folder is replaced as a whole.

    Yields:
        The path to write to; a folder has to be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp.{path.name}")
    _remove(temporary)
    try:
        yield temporary
        for file in _files(temporary):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        if temporary.is_dir() and path.exists():
            older = path.with_name(f".old.{path.name}")
            _remove(older)
            path.rename(older)
            temporary.rename(path)
            _remove(older)
        else:
            temporary.replace(path)
    finally:
        _remove(temporary)


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
