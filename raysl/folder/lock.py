"""One process at a time in a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raysl.errors import RayslError, RunFolderError

LOCK = ".lock"
"""Name of the file; it holds the number of the process that holds the folder, or held it last."""


@contextmanager
def held(
    path: Path,
    *,
    doing: str,
    instead: str,
    elsewhere: str = "set output_dir to a folder that can",
    error: type[RayslError] = RunFolderError,
) -> Iterator[None]:
    """Make a folder and hold it for one process; the lock goes with the process, however it ends.

    Args:
        path: The folder, on a local or shared disk.
        doing: What a process that holds it does, such as ``is training in``.
        instead: What else the caller may do, such as ``give this run another name=...``.
        elsewhere: What to do if it cannot be written.
        error: What to raise.

    Raises:
        RayslError: Of the class ``error``, if another process holds it, or it cannot be made.
    """
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path / LOCK, "a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                process = file.read().strip() or "unknown"
                raise error(
                    f"{path}: process {process} {doing} this folder; wait for it, or {instead}"
                ) from None
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        except OSError as problem:
            raise error(f"{path}: cannot be written: {problem.strerror}; {elsewhere}") from None
        yield
