"""Let the worker processes of a Ray that this process starts come from a fork server."""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ray._private import parameter
from ray._private.ray_constants import SETUP_WORKER_FILENAME
from ray._private.workers import __file__ as of_workers

from raysl.run import fork_client

SWITCH = "RAYSL_FORK_WORKERS"
_LONGEST_PATH = 107  # of a Unix socket, in bytes
_server: "tuple[subprocess.Popen[bytes], str] | None" = None  # and the folder of its socket


def can_fork() -> bool:
    """Return whether worker processes may be forked: on Linux, unless RAYSL_FORK_WORKERS=0."""
    wanted = os.environ.get(SWITCH, "1") != "0"
    return wanted and sys.platform == "linux" and shutil.which("cat") is not None


@contextmanager
def forked_workers() -> Iterator[None]:
    """Give the Ray that is started meanwhile a fork server, where this is possible.

    The server ends with this process, or with :func:`end_server`.
    """
    path = _start_server() if can_fork() else None
    if path is None:
        yield
        return
    names = {
        fork_client.SERVER: path,
        fork_client.OTHERWISE: str(Path(of_workers).with_name(SETUP_WORKER_FILENAME)),
    }
    module: Any = parameter
    real = module.RayParams
    module.RayParams = partial(real, setup_worker_path=fork_client.__file__)
    os.environ.update(names)
    try:
        yield
    finally:
        module.RayParams = real
        for name in names:
            os.environ.pop(name, None)


def _start_server() -> str | None:
    """Return the socket of a new server; None if there cannot be one, which costs only time."""
    global _server  # noqa: PLW0603 - one for each process, like Ray itself
    end_server()
    # A process that is forked after CUDA was initialized cannot use it, and importing torch might
    # do that where there is a GPU.
    gpus = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/kfd")
    options = [] if gpus else ["with-torch"]
    with suppress(OSError):
        folder = tempfile.mkdtemp(prefix="raysl-")  # for this user only
        path = os.path.join(folder, "fork")
        if len(path) <= _LONGEST_PATH:
            scripts = os.path.dirname(of_workers)
            command = [sys.executable, "-m", "raysl.run.ray_fork_server", path, scripts, *options]
            server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
            _server = server, folder
            return path
        os.rmdir(folder)
    return None


def end_server() -> None:
    """End the fork server of this process; its workers, if any are left, go on."""
    global _server  # noqa: PLW0603
    if _server is not None:
        server, folder = _server
        server.kill()  # it may be in the middle of an import, for which nobody should wait
        server.communicate()
        shutil.rmtree(folder, ignore_errors=True)
    _server = None
