"""One process at a time in a folder."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_lock(folder: Path, *, busy: Callable[[str], Exception]) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Args:
        folder: Is there, on a local or shared disk.
        busy: Makes the error to raise if another process holds it, from that process's number.

    Raises:
        OSError: If the folder cannot be written.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise busy(file.read().strip() or "unknown") from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
