"""Lock a folder for one process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raysl.errors import RayslError, RunFolderError

LOCK = ".lock"
"""Name of the lock file, which contains the id of the process that locked the folder last."""


@contextmanager
def lock_folder(
    path: Path,
    *,
    doing: str,
    instead: str,
    elsewhere: str = "set output_dir to a folder that can",
    error: type[RayslError] = RunFolderError,
) -> Iterator[None]:
    """Create a folder and lock it in a ``with`` block; the lock also ends if the process dies.

    Args:
        path: The folder, on a local or shared disk.
        doing: What the process that holds the lock does, such as ``is training in``.
        instead: Advice for the user other than to wait, such as ``give this run another name=...``.
        elsewhere: Advice if the folder cannot be written.
        error: Class of the exception to raise.

    Raises:
        RayslError: Of class ``error``, if another process holds the lock or the folder cannot be
            created.
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
