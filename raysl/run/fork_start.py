"""Start and end the process from which the workers of a Ray of our own are forked. No Ray.

The server imports for seconds what workers need, so it starts before this process does the same.
"""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from raysl.config.load import apply_overrides, get_key, read_mapping
from raysl.config.shipped import find_config
from raysl.errors import RayslError
from raysl.folder.address import is_address

SWITCH = "RAYSL_FORK_WORKERS"
_NUM_TRAIN_WORKERS = "cluster.num_train_workers"
_LONGEST_PATH = 107  # of a Unix socket, in bytes
_server: "tuple[subprocess.Popen[bytes], str] | None" = None  # and its socket
_is_unused = False  # a server forks the workers of one Ray only


def can_fork() -> bool:
    """Return whether worker processes may be forked: on Linux, unless RAYSL_FORK_WORKERS=0."""
    wanted = os.environ.get(SWITCH, "1") != "0"
    return wanted and sys.platform == "linux" and shutil.which("cat") is not None


@contextmanager
def server_beside_imports(config: Path | str, overrides: Sequence[str]) -> Iterator[None]:
    """Start the server of a run before torch is imported, if the run starts a Ray of its own.

    Args:
        config: The configuration file of the run, or the name of a shipped one.
        overrides: Dotted settings of the command line.
    """
    if can_fork() and _starts_ray(config, overrides):
        start_server()
    try:
        yield
    finally:
        end_server()


def _starts_ray(config: Path | str, overrides: Sequence[str]) -> bool:
    has_ray = "RAY_ADDRESS" in os.environ or "ray" in sys.modules
    if has_ray or is_address(config):
        return False
    try:
        values = apply_overrides(read_mapping(find_config(Path(config))), overrides)
        return bool(get_key(values, _NUM_TRAIN_WORKERS) != 0)
    except RayslError:  # the command says what is wrong, once it has loaded the settings
        return False


def server_for_a_ray() -> str | None:
    """Return the socket of the server that waits for a Ray, or of a new one; None without one."""
    global _is_unused  # noqa: PLW0603
    if not (_is_unused and _server is not None and _server[0].poll() is None):
        start_server()
    _is_unused = False
    return None if _server is None else _server[1]


def start_server() -> None:
    """Start the server in place of an earlier one; that there cannot be one costs only time."""
    global _server, _is_unused
    end_server()
    # A process that is forked after CUDA was initialized cannot use it, and importing torch might
    # do that where there is a GPU.
    gpus = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/kfd")
    options = [] if gpus else ["with-torch"]
    with suppress(OSError):
        folder = tempfile.mkdtemp(prefix="raysl-")  # for this user only
        path = os.path.join(folder, "fork")
        if len(path) <= _LONGEST_PATH:
            command = [sys.executable, "-m", "raysl.run.ray_fork_server", path]
            command += [str(scripts_of_ray()), *options]
            server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )
            _server, _is_unused = (server, path), True
            return
        os.rmdir(folder)


def scripts_of_ray() -> Path:
    """Return the folder of the scripts that Ray's worker processes run."""
    spec = find_spec("ray")  # which does not import it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "_private" / "workers"


def end_server() -> None:
    """End the fork server of this process; its workers, if any are left, go on."""
    global _server  # noqa: PLW0603
    if _server is not None:
        server, path = _server
        server.kill()  # it may be in the middle of an import, for which nobody should wait
        server.communicate()
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    _server = None
