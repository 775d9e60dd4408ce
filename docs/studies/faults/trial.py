"""A run of raysl in processes of its own, which can be found, hurt, watched and compared.

Every process of a trial inherits an environment variable that names the trial. So its processes are
found whatever became of their parents, and those of other runs on the machine are never touched.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

HERE = Path(__file__).resolve().parent
_MARK = "FAULTS_TRIAL"
_POLL_S = 0.05
_ATTEMPTS = 3
_FOREIGN_S = 30.0
_FOREIGN: dict[str, tuple[float, set[str]]] = {}
_HEAD_ROLES = ("raylet", "gcs", "dashboard", "log monitor", "autoscaler monitor", "client server")

# Words of a command line by role; the first that fits counts.
_ROLES = [
    ("train worker", "ray::RayTrainWorker"),
    ("data worker", "ray::MapWorker"),
    ("controller", "ray::TrainController"),
    ("coordinator", "ray::SplitCoordinator"),
    ("autoscaling coordinator", "ray::_AutoscalingCoordinator"),
    ("evaluation", "ray::Evaluat"),
    ("other actor", "ray::_"),
    ("idle worker", "ray::IDLE"),
    ("dashboard agent", "ray::DashboardAgent"),
    ("runtime env agent", "ray::RuntimeEnvAgent"),
    ("other ray", "ray::"),
    ("raylet", "raylet/raylet"),
    ("gcs", "gcs/gcs_server"),
    ("dashboard", "dashboard/dashboard.py"),
    ("log monitor", "log_monitor.py"),
    ("autoscaler monitor", "autoscaler/_private/monitor.py"),
    ("client server", "ray.util.client.server"),
    # The agents before they have their titles; the raylet's command line names them too.
    ("dashboard agent", "dashboard/agent.py"),
    ("runtime env agent", "runtime_env/agent/main.py"),
    ("fork server", "raysl.run.ray_fork_server"),
    ("driver", "raysl pretrain"),
    ("driver", "pipelines/pretrain.py"),
    ("mlflow", "mlflow"),
]


class Found(NamedTuple):
    """A process of a trial."""

    pid: int
    role: str
    started: float  # seconds since 1970
    run: str
    """The part of the mark after the trial's name: which of its runs it belongs to."""


def processes(mark: str) -> list[Found]:
    """Return the processes of a trial, those of Ray that outlived their driver too."""
    found, foreign = [], _foreign_of(mark)
    for name in os.listdir("/proc"):
        if name.isdigit() and name not in foreign:
            with suppress(psutil.Error, OSError):
                environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                marks = [e for e in environment if e.startswith(f"{_MARK}=".encode())]
                ours, _, run = (marks or [b""])[0].decode()[len(_MARK) + 1 :].partition(":")
                if ours == mark:
                    words = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    started = psutil.Process(int(name)).create_time()
                    found.append(Found(int(name), role_of(words), started, run))
                elif environment != [b""]:  # one that is just starting has none yet
                    foreign.add(name)
    return found


def _foreign_of(mark: str) -> set[str]:
    """Return the processes that were not of the trial a moment ago: to look at all takes time."""
    until, foreign = _FOREIGN.get(mark, (0.0, set()))
    if time.monotonic() > until:  # numbers of processes are used again
        foreign = set()
        _FOREIGN[mark] = (time.monotonic() + _FOREIGN_S, foreign)
    return foreign


def role_of(words: str) -> str:
    """Return the role of a process by its command line."""
    return next((role for role, part in _ROLES if part in words), "other")


def end_all(mark: str, roles: Sequence[str] = (), *, run: str | None = None) -> None:
    """Kill the processes of a trial, of some roles or all, of one of its runs or all."""

    def still() -> list[Found]:
        found = [p for p in processes(mark) if run is None or p.run == run]
        return [p for p in found if not roles or p.role in roles]

    while found := still():
        for process in found:
            with suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Trial:
    """A folder with a configuration, the environment of its processes, and their output.

    Args:
        folder: Where everything goes; its name is the mark of the processes.
        code: The checkout whose raysl runs.
        run: Which run of the trial the processes belong to.
    """

    def __init__(self, folder: Path, code: Path, run: str = "") -> None:
        self.folder, self.code = folder.absolute(), code.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mark, self.name = self.folder.name, run
        self.log = self.folder / f"output{run}.log"
        # Ray's sockets lie below its folder, and their paths have a limit of 107 bytes.
        self.ray_folder = Path("/tmp") / f"ft-{self.mark}{run[:1]}"
        self.ray_folder.mkdir(exist_ok=True)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "MLFLOW"))}
        self.env |= {
            _MARK: f"{self.mark}:{run}",
            "PYTHONPATH": f"{self.code}:{HERE.parent}",
            "RAY_TMPDIR": str(self.ray_folder),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray kills workers if the machine, with whatever else runs on it, is short of memory.
            "RAY_memory_monitor_refresh_ms": "0",
            # On a busy machine Ray would give up its own start.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
            "RAY_gcs_server_port_wait_time_s": "180",
            "RAY_NUM_REDIS_GET_RETRIES": "180",
            "RAYSL_HOME": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GIT_PYTHON_REFRESH": "quiet",
        }

    def start(self, command: Sequence[str], **env: str) -> "subprocess.Popen[bytes]":
        """Start a process of this trial in a group of its own; its output goes to the log."""
        with open(self.log, "ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.env | env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                process_group=0,
            )

    def run(self, command: Sequence[str], **env: str) -> int:
        """Run a process of this trial to its end and return its status."""
        return self.start(command, **env).wait()

    def pretrain(self, config: Path, *overrides: str, **env: str) -> "subprocess.Popen[bytes]":
        """Start ``raysl pretrain``."""
        return self.start(
            [sys.executable, "-m", "raysl", "pretrain", str(config), *overrides], **env
        )

    def find(self, role: str) -> list[Found]:
        """Return the trial's processes of a role, oldest first."""
        found = [p for p in processes(self.mark) if p.role == role]
        return sorted(found, key=lambda p: p.started)

    def text(self) -> str:
        """Return the output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Head:
    """A lasting cluster of this machine: ``ray start --head``, on ports of its own.

    Args:
        trial: The trial that it belongs to.
        num_cpus: Logical CPUs of the head.
        env: Further environment of its processes.
    """

    def __init__(self, trial: Trial, *, num_cpus: int, **env: str) -> None:
        self.trial, self.num_cpus, self.env = trial, num_cpus, env
        self.port, self.dashboard, self.agent = free_port(), free_port(), free_port()
        self.client = free_port()
        self.address = f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the head; after a crash too, on the same ports."""
        command = ["ray", "start", "--head", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        command += [f"--port={self.port}", f"--dashboard-port={self.dashboard}"]
        command += [f"--dashboard-agent-listen-port={self.agent}", f"--num-cpus={self.num_cpus}"]
        command += [f"--ray-client-server-port={self.client}", "--include-dashboard=true"]
        command += [f"--temp-dir={self.trial.ray_folder}", "--object-store-memory=300000000"]
        for _ in range(_ATTEMPTS):  # on a busy machine Ray gives its dashboard too little time
            if self.trial.run(command, RAY_AUTH_MODE="disabled", **self.env) == 0:
                return
            end_all(self.trial.mark, [*_HEAD_ROLES, "other"], run=self.trial.name)
        raise RuntimeError(f"ray start failed {_ATTEMPTS} times: see {self.trial.log}")

    def add_node(self, num_cpus: int) -> set[int]:
        """Start another raylet on this machine; return its processes' numbers."""
        before = {p.pid for p in processes(self.trial.mark)}
        command = ["ray", "start", f"--address={self.address}", "--node-ip-address=127.0.0.1"]
        command += [f"--num-cpus={num_cpus}", "--object-store-memory=200000000"]
        command += ["--disable-usage-stats"]
        if status := self.trial.run(command, RAY_AUTH_MODE="disabled", **self.env):
            raise RuntimeError(f"ray start ended with {status}: see {self.trial.log}")
        return {p.pid for p in processes(self.trial.mark) if p.pid not in before}


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON; one that is being written is left out."""
    found = []
    with suppress(OSError):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def records(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the metrics of a run."""
    return lines(run_folder / "metrics.jsonl")


def losses(run_folder: Path) -> dict[int, float]:
    """Return the loss by step, as written: a number is the same bits only if they are equal."""
    return {r["step"]: r["train/loss"] for r in records(run_folder) if "train/loss" in r}


def checkpoints(run_folder: Path) -> set[int]:
    """Return the steps of the complete checkpoints."""
    found = (run_folder / "checkpoints").glob("step-*")
    return {int(p.name.removeprefix("step-")) for p in found if p.name[5:].isdigit()}


def differing(run_folder: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs: tensors of the encoder, and losses."""
    from safetensors.numpy import load_file  # noqa: PLC0415 - not for those who only start runs

    ours, theirs = (load_file(f / "encoder.safetensors") for f in (run_folder, other))
    found = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or ours[name].tobytes() != theirs[name].tobytes()
    ]
    one, two = losses(run_folder), losses(other)
    found += [
        f"loss of step {s}" for s in sorted(one.keys() | two.keys()) if one.get(s) != two.get(s)
    ]
    return found


def waiting(limit_s: float) -> Iterator[float]:
    """Yield seconds so far at short intervals until a limit."""
    began = time.monotonic()
    while (now := time.monotonic() - began) < limit_s:
        yield now
        time.sleep(_POLL_S)
