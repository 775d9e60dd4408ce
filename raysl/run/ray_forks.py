"""Let the worker processes of a Ray that this process starts come from a fork server."""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ray._private import parameter
from ray._private.ray_constants import SETUP_WORKER_FILENAME
from ray._private.workers import __file__ as of_workers

from raysl.run import fork_client

SWITCH = "RAYSL_FORK_WORKERS"
_server: "subprocess.Popen[bytes] | None" = None


def can_fork() -> bool:
    """Return whether worker processes may be forked: on Linux, unless RAYSL_FORK_WORKERS=0."""
    wanted = os.environ.get(SWITCH, "1") != "0"
    return wanted and sys.platform == "linux" and shutil.which("cat") is not None


@contextmanager
def forked_workers() -> Iterator[None]:
    """Give the Ray that is started meanwhile a fork server, where this is possible.

    The server ends with this process, or with :func:`end_server`.
    """
    global _server  # noqa: PLW0603 - one for each process, like Ray itself
    if not can_fork():
        yield
        return
    end_server()
    path = Path(tempfile.mkdtemp(prefix="raysl-")) / "fork"  # a folder of this user only
    # A process that was forked after CUDA was initialized could not use it, and importing torch
    # might do so where there is a GPU.
    options = [] if glob.glob("/dev/nvidia[0-9]*") else ["with-torch"]
    command = [sys.executable, "-m", "raysl.run.ray_fork_server", str(path), *options]
    _server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    names = {
        fork_client.SERVER: str(path),
        fork_client.OTHERWISE: str(Path(of_workers).with_name(SETUP_WORKER_FILENAME)),
    }
    real: Any = parameter.RayParams
    parameter.RayParams = partial(real, setup_worker_path=fork_client.__file__)  # type: ignore[misc,assignment]
    os.environ.update(names)
    try:
        yield
    finally:
        parameter.RayParams = real  # type: ignore[misc]
        for name in names:
            os.environ.pop(name, None)


def end_server() -> None:
    """End the fork server of this process; its workers, if any are left, go on."""
    global _server  # noqa: PLW0603
    if _server is not None and _server.stdin is not None:
        _server.stdin.close()
        _server.wait(timeout=30)
    _server = None
