"""Lock a folder for one process at a time."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raysl.errors import RunFolderError


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


@contextmanager
def held(path: Path, *, doing: str, instead: str) -> Iterator[None]:
    """Make a folder and hold it for one process; the lock goes with the process, however it ends.

    Args:
        path: The folder.
        doing: What a process that holds it is about, such as ``training``.
        instead: What else the caller may do, such as ``give this run another name=...``.

    Raises:
        RunFolderError: If another process holds it, or it cannot be made.
    """

    def busy(process: str) -> RunFolderError:
        return RunFolderError(
            f"{path}: process {process} is {doing} in this folder; wait for it, or {instead}"
        )

    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(path, busy=busy))
        except OSError as error:
            raise RunFolderError(
                f"{path}: cannot be written: {error.strerror}; set output_dir to a folder that can"
            ) from None
        yield
