"""Local folders for copies of what is in a store; they go with the process that made them."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "raysl-copy-"
_LOCK = ".in-use"


def scratch_base() -> Path:
    """Return the folder of all local copies: RAYSL_SCRATCH, else one below the temporary folder."""
    given = os.environ.get("RAYSL_SCRATCH")
    if given:
        return Path(given).expanduser().absolute()
    return Path(tempfile.gettempdir()) / f"raysl-scratch-{os.getuid()}"


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Provide an empty local folder called ``name``, and delete it at the end of the block.

    Folders that killed processes left behind are deleted first.
    """
    base = scratch_base()
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    delete_abandoned(base)
    outer = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    with open(outer / f"{_LOCK}.new", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).rename(outer / _LOCK)  # now others may look at it
        try:
            folder = outer / name
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(outer, ignore_errors=True)


def delete_abandoned(base: Path) -> None:
    """Delete the local copies whose processes have ended."""
    for outer in base.glob(f"{_PREFIX}*"):
        with suppress(OSError), open(outer / _LOCK, "r+", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its process lives
            shutil.rmtree(outer, ignore_errors=True)
