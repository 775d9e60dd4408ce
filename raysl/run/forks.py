"""Start and end the fork server, from which worker processes of a Ray of our own come.

Nothing here imports Ray, so that a command starts the server before its own imports, which take one
core for seconds.
"""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from raysl.run.variables import has_own_ray, set_own_variables

SWITCH = "RAYSL_FORK_WORKERS"
_LONGEST_PATH = 107  # of a Unix socket, in bytes
# What the server imports for train workers.
_FOR_TRAINING = (
    "torch",
    "raysl.run.ray_worker",
    "ray.tune",  # Ray Train imports it when a worker first asks about its run
    "torch._dynamo",  # torch imports it for the first optimizer
)


class _Server(NamedTuple):
    process: "subprocess.Popen[bytes]"
    folder: str  # of its socket
    variables: dict[str, str]  # those of Ray when it was started

    @property
    def socket(self) -> str:
        return _socket_in(self.folder)


_server: _Server | None = None
_is_early = False  # whether the server was started early and no Ray uses it yet


def can_fork() -> bool:
    """Return whether worker processes may be forked: on Linux, unless RAYSL_FORK_WORKERS=0."""
    if os.environ.get(SWITCH, "1") == "0" or sys.platform != "linux" or not shutil.which("cat"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # before Linux 5.3, and in some sandboxes
        return False
    return True


@contextmanager
def early_server(modules: Sequence[str] = ()) -> Iterator[None]:
    """Start the fork server of the Ray that this process will start, and end it after the block.

    Does nothing if workers cannot be forked, the run joins a cluster, or Ray is imported already:
    its variables are read by then, and the imports that the server would overlap are done.

    Args:
        modules: Modules that this run's workers need in addition to those of every run.
    """
    global _is_early  # noqa: PLW0603
    if not can_fork() or not has_own_ray() or _knows_ray():
        yield
        return
    set_own_variables()
    _start(modules)
    _is_early = True
    try:
        yield
    finally:
        end_server()


def _knows_ray() -> bool:
    return "ray" in sys.modules


def serve_workers(modules: Sequence[str] = ()) -> str | None:
    """Return the socket of a server for a Ray that is about to start; None if there cannot be one.

    Takes the server of :func:`early_server` if it has the variables that this process has now.

    Args:
        modules: Modules that a new server imports in addition to those of every run.
    """
    global _is_early  # noqa: PLW0603
    fits = _server is not None and _server.variables == _variables_of_ray()
    if _is_early and fits and _server is not None and _server.process.poll() is None:
        _is_early = False
        return _server.socket
    return _start(modules) if can_fork() else None


def _start(modules: Sequence[str] = ()) -> str | None:
    global _server  # noqa: PLW0603 - one for each process, like Ray itself
    end_server()
    # A process that is forked after CUDA was initialized cannot use it, and importing torch might
    # do that where there is a GPU.
    gpus = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/kfd")
    imports = [] if gpus else [*_FOR_TRAINING, *modules]
    with suppress(OSError):
        folder = tempfile.mkdtemp(prefix="raysl-")  # for this user only
        if len(_socket_in(folder)) <= _LONGEST_PATH:
            arguments = [_socket_in(folder), str(workers_folder()), *imports]
            process = subprocess.Popen(
                [sys.executable, "-m", "raysl.run.ray_fork_server", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={"RAY_AUTH_MODE": "token"} | os.environ,  # as ray.init will set it
                start_new_session=True,
            )
            _server = _Server(process, folder, _variables_of_ray())
            return _server.socket
        os.rmdir(folder)
    return None


def _socket_in(folder: str) -> str:
    return os.path.join(folder, "fork")


def workers_folder() -> Path:
    """Return the folder of Ray's scripts that worker processes run."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "_private" / "workers"


def _variables_of_ray() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    variables.pop("RAY_CLIENT_MODE", None)  # Ray sets it when it is imported, also in the server
    return variables


def end_server() -> None:
    """End the fork server of this process; its workers, if any are left, go on."""
    global _server, _is_early
    if _server is not None:
        _server.process.kill()  # it may be in the middle of an import, for which nobody should wait
        _server.process.communicate()
        shutil.rmtree(_server.folder, ignore_errors=True)
    _server, _is_early = None, False
