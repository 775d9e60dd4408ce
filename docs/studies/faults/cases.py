"""The faults of the kill table: what each needs, and what it does to a run."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from faults.running import EVERY, FIRST, Running, Settings, settings
from faults.trial import (
    Head,
    Trial,
    checkpoints,
    end_all,
    free_port,
    lines,
    processes,
    records,
    waiting,
)

_OUTAGE_S = 20.0


def kill(pids: set[int]) -> None:
    """Kill processes; some may have ended."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


class Case:
    """A fault: one process killed, if nothing is overridden.

    Args:
        role: The process that is hit.
        number: The signal that it gets.
        num_train_workers: ``cluster.num_train_workers`` of the run.
    """

    starts_over = False
    """Whether the run has to start from its first step afterwards."""
    compares = True
    """Whether its numbers must be those of an undisturbed run."""
    alike = "small"
    """Cases of one name, number of train workers and length share their undisturbed run."""
    every = EVERY
    """Steps between two faults; more if a fault lasts while the run goes on."""

    def __init__(
        self,
        role: str = "",
        number: signal.Signals = signal.SIGKILL,
        *,
        num_train_workers: Any = 1,
    ) -> None:
        self.role, self.number, self.num_train_workers = role, number, num_train_workers

    def times(self, most: int) -> int:
        """Return how often the fault is done in a run."""
        return most

    def step(self, number: int) -> int:
        """Return the step at which fault ``number``, from 0, is done."""
        return self.length(number)

    def length(self, times: int) -> int:
        """Return the number of steps of the run."""
        return FIRST + self.every * times

    def settings(self, times: int) -> Settings:
        """Return the settings of the run."""
        return settings(steps=self.length(times), num_train_workers=self.num_train_workers)

    @property
    def most_workers(self) -> int:
        """Number of train workers of the undisturbed run."""
        return self.num_train_workers if isinstance(self.num_train_workers, int) else 1

    def alone(self, times: int) -> Settings:
        """Return the settings of the undisturbed run: one worker computes the same without Ray."""
        workers = self.most_workers
        return settings(steps=self.length(times), num_train_workers=0 if workers == 1 else workers)

    @contextmanager
    def prepared(self, trial: Trial, times: int) -> Iterator[Running]:
        """Provide the run, which is not started yet."""
        yield Running(trial, self.settings(times))

    def harm(self, run: Running) -> float:
        """Do the fault; return when, in seconds since 1970."""
        now = run.hit(self.role, self.number)
        if self.role == "driver":
            for _ in waiting(150):  # after a signal it ends its step first
                if run.status() is not None:
                    break
        return now

    def measured(self, run: Running, at: float) -> dict[str, Any]:
        """Return what else is told of a fault at a time."""
        return {}

    def at_end(self, run: Running) -> dict[str, Any]:
        """Return what else is told of a run."""
        return {}


class Hung(Case):
    """A worker hangs: its process is stopped, or it waits in Python for ever."""

    def __init__(self, *, in_python: bool) -> None:
        super().__init__("train worker", signal.SIGSTOP)
        self.in_python = in_python

    @contextmanager
    def prepared(self, trial: Trial, times: int) -> Iterator[Running]:
        """Provide the run with a short limit of a step, if the version has one."""
        found = "max_step_s" in (trial.code / "docs" / "config_reference.md").read_text()
        limit = ["health.max_step_s=5"] if found else []
        yield Running(trial, self.settings(times), *limit)

    def harm(self, run: Running) -> float:
        """Stop the process, or let its next step hang."""
        if not self.in_python:
            return super().harm(run)
        now = time.time()
        run.hang.touch()
        for _ in waiting(30):
            if not run.hang.exists():
                break
        return now


class FlippedBits(Case):
    """The driver is killed, and bits of the newest checkpoint are flipped."""

    def harm(self, run: Running) -> float:
        """Flip the bits of one byte in the middle of each tensor file."""
        run.send(signal.SIGKILL)
        now = time.time()
        for _ in waiting(60):  # workers may write a checkpoint until they end
            if not run.trial.find("train worker") and run.status() is not None:
                break
        newest = max(checkpoints(run.folder))
        path = run.folder / "checkpoints" / f"step-{newest:09d}" / "state.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        return now


class FolderDeleted(Case):
    """The run folder is deleted; the run is over, and the command starts it anew."""

    starts_over = True

    def step(self, number: int) -> int:
        """Return the same step each time."""
        return FIRST

    def harm(self, run: Running) -> float:
        """Delete the folder, and wait for the end of the driver."""
        shutil.rmtree(run.folder)
        now = time.time()
        for _ in waiting(150):
            if run.status() is not None:
                break
        return now


class DiskFull(Case):
    """The disk of the run folder has no room for ten seconds, over a checkpoint."""

    every = 50

    @contextmanager
    def prepared(self, trial: Trial, times: int) -> Iterator[Running]:
        """Provide the run on a small disk of its own, which needs root."""
        runs = trial.folder / "runs"
        runs.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "faults", str(runs)]
        subprocess.run(mount, check=True)
        try:
            yield Running(trial, self.settings(times))
            for folder in runs.iterdir():  # what is compared and kept
                shutil.copytree(folder, trial.folder / "kept", dirs_exist_ok=True)
        finally:
            end_all(trial.mark)
            subprocess.run(["umount", str(runs)], check=True)

    def harm(self, run: Running) -> float:
        """Fill the disk, and free it again."""
        ballast = run.folder.parent / "ballast"
        with open(ballast, "wb", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        full = checkpoints(run.folder)
        for waited in waiting(_OUTAGE_S):
            if run.status() is not None or waited > 10:
                break
        self.failed = checkpoints(run.folder) == full
        ballast.unlink()
        return time.time()

    def measured(self, run: Running, at: float) -> dict[str, Any]:
        """Return whether the fault kept a checkpoint from being written."""
        return {"a_checkpoint_failed": self.failed}


class MlflowAway(Case):
    """The MLflow server is killed, and started again after some twenty seconds."""

    every = 25

    @contextmanager
    def prepared(self, trial: Trial, times: int) -> Iterator[Running]:
        """Provide the run with a server."""
        self.port = free_port()
        self._start(trial)
        config = self.settings(times)
        config["track"] = {
            "mlflow": True,
            "tracking_uri": f"http://127.0.0.1:{self.port}",
            "log_model": False,
        }
        config["method"] |= {"pace_s": 1.0}  # few steps while the server is away
        yield Running(trial, config)

    def _start(self, trial: Trial) -> None:
        command = [sys.executable, "-m", "mlflow", "server", f"--port={self.port}", "--workers=1"]
        trial.start([*command, f"--backend-store-uri=sqlite:///{trial.folder}/mlflow.db"])

    def harm(self, run: Running) -> float:
        """Kill the server and start it again; the run goes on meanwhile."""
        now = time.time()
        end_all(run.trial.mark, ["mlflow"])
        time.sleep(6)
        self._start(run.trial)
        return now

    def at_end(self, run: Running) -> dict[str, Any]:
        """Return how many losses the server has, of how many."""
        from mlflow.tracking import MlflowClient  # noqa: PLC0415, TID251 - slow to load

        client = MlflowClient(f"sqlite:///{run.trial.folder}/mlflow.db")
        ids = [e.experiment_id for e in client.search_experiments()]
        runs = client.search_runs(ids)
        history = [m for r in runs for m in client.get_metric_history(r.info.run_id, "train/loss")]
        sent = {(m.step, m.value) for m in history}
        logged = {(r["step"], r["train/loss"]) for r in records(run.folder) if "train/loss" in r}
        return {
            "mlflow": {"runs": len(runs), "values": len(history), "missing": len(logged - sent)}
        }


class OnCluster(Case):
    """A fault of a run on a cluster that outlives it."""

    num_cpus = 2

    @contextmanager
    def prepared(self, trial: Trial, times: int) -> Iterator[Running]:
        """Provide the run on a cluster of its own."""
        self.head = Head(trial, num_cpus=self.num_cpus, **self.environment(trial))
        self.head.start()
        yield self.running(trial, times)

    def environment(self, trial: Trial) -> dict[str, str]:
        """Return further environment of the cluster."""
        return {}

    def running(self, trial: Trial, times: int) -> Running:
        """Return the run."""
        return Running(trial, self.settings(times), head=self.head)


class DataWorkerLost(OnCluster):
    """A data worker is killed, in a run whose views do not fit into the object store at once."""

    alike = "large"

    def settings(self, times: int) -> Settings:
        """Return settings by which data workers have work until after the last fault."""
        return self._large(super().settings(times))

    def alone(self, times: int) -> Settings:
        """Return the same for the undisturbed run."""
        return self._large(super().alone(times))

    def _large(self, config: Settings) -> Settings:
        config["data"]["views"]["kinds"][0]["size_px"] = 224
        config["backbone"]["stem"] = "imagenet"
        config["train"]["steps"] += 4 * EVERY
        return config


class JobStop(OnCluster):
    """``ray job stop``, and the job submitted again."""

    def running(self, trial: Trial, times: int) -> Running:
        """Return the run as a job, once the cluster takes jobs."""
        command = ["ray", "job", "list", f"--address=http://127.0.0.1:{self.head.dashboard}"]
        for _ in waiting(60):
            if trial.run(command, RAY_ADDRESS=f"http://127.0.0.1:{self.head.dashboard}") == 0:
                break
        return Running(trial, self.settings(times), head=self.head, as_job=True)

    def harm(self, run: Running) -> float:
        """Stop the job."""
        now = time.time()
        address = f"http://127.0.0.1:{self.head.dashboard}"
        command = ["ray", "job", "stop", f"--address={address}", f"job-{run.jobs}"]
        run.trial.run(command, RAY_ADDRESS=address)
        for _ in waiting(60):
            if run.status() is not None:
                break
        return now


class HeadLost(OnCluster):
    """All processes of the head die, and it is started again."""

    def harm(self, run: Running) -> float:
        """Kill the head and what runs on it, but not the driver; start a new one."""
        now = time.time()
        kill({p.pid for p in processes(run.trial.mark) if p.role != "driver"})
        for _ in waiting(20):
            if run.status() is not None:
                break
        self.head.start()
        return now


class ControlStoreLost(OnCluster):
    """The control store of Ray dies, keeps its state in RocksDB, and is started again."""

    def environment(self, trial: Trial) -> dict[str, str]:
        """Return Ray's settings of the store."""
        return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(trial.folder / "gcs")}

    def harm(self, run: Running) -> float:
        """Kill the store; start it as it was started after five seconds."""
        (store,) = run.trial.find("gcs")
        words = Path(f"/proc/{store.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        environment = Path(f"/proc/{store.pid}/environ").read_bytes().decode().split("\0")
        env = dict(each.split("=", 1) for each in environment if "=" in each)
        now = run.hit("gcs")
        time.sleep(5)
        run.trial.start(words, **env)
        return now


class NodeLost(OnCluster):
    """One of two nodes dies with a train worker on it; the other has room for all of them."""

    num_cpus = 0
    every = 25

    def settings(self, times: int) -> Settings:
        """Return settings by which every free CPU makes views."""
        config = super().settings(times)
        config["cluster"] |= {"num_data_workers": None, "cpus_per_train_worker": 1}
        return config

    def running(self, trial: Trial, times: int) -> Running:
        """Return the run, with two nodes."""
        self.nodes = [self.head.add_node(3), self.head.add_node(3)]
        return super().running(trial, times)

    def harm(self, run: Running) -> float:
        """Kill a node with a train worker; the one that took its place came before."""
        if len(self.nodes) == 1:
            self.nodes.append(self.head.add_node(3))
            run.reach(run.step() + 2)  # Ray has heard of it
        of_workers = {psutil.Process(p.pid).ppid() for p in run.trial.find("train worker")}
        lost = next(node for node in self.nodes if node & of_workers)
        now = time.time()
        kill(lost | {p.pid for p in processes(run.trial.mark) if _parent(p.pid) in lost})
        self.nodes.remove(lost)
        return now


def _parent(pid: int) -> int | None:
    with suppress(psutil.Error):
        return psutil.Process(pid).ppid()
    return None


class NodeAdded(OnCluster):
    """A node comes, and a run that may have two train workers gets the second."""

    compares = False  # two workers round otherwise than one
    every = 25  # restarts

    def settings(self, times: int) -> Settings:
        """Return settings of an elastic run, long enough for its restarts."""
        config = super().settings(times)
        config["cluster"] |= {
            "num_train_workers": {"min": 1, "max": 2},
            "cpus_per_train_worker": 1,
            "resize_every_s": 0,
        }
        config["backbone"] |= {"batch_norm": "sync"}
        config["method"] |= {"pace_s": 1.0}
        return config

    def running(self, trial: Trial, times: int) -> Running:
        """Return the run on one node."""
        self.node: set[int] = set()
        return super().running(trial, times)

    def harm(self, run: Running) -> float:
        """Add a node, and wait for the first step of two workers."""
        if self.node:
            kill(self.node)
            for _ in waiting(150):
                if _workers(run) == 1:
                    break
        now = time.time()
        self.node = self.head.add_node(2)
        self.seconds = None
        for _ in waiting(150):
            if _workers(run) == 2:
                self.seconds = round(time.time() - now, 1)
                break
        return now

    def measured(self, run: Running, at: float) -> dict[str, Any]:
        """Return the seconds to the first step of two workers."""
        return {"seconds": self.seconds, "wasted": None}

    def at_end(self, run: Running) -> dict[str, Any]:
        """Return the events of the run, which tell the steps that were done again."""
        return {"events": [e.get("text") for e in lines(run.folder / "events.jsonl")]}


def _workers(run: Running) -> int:
    """Return the number of train workers of the newest step."""
    found = [r for r in records(run.folder) if "cluster/train_workers" in r]
    return int(found[-1]["cluster/train_workers"]) if found else 0


class StoreAway(Case):
    """The object store of the run folder does not answer for twenty seconds."""

    every = 40

    @contextmanager
    def prepared(self, trial: Trial, times: int) -> Iterator[Running]:
        """Provide the run in a bucket of a server on the loopback."""
        import pyarrow.fs as pafs  # noqa: PLC0415

        port = free_port()
        server = Path(__file__).with_name("store_server.py")
        self.server = trial.start([sys.executable, str(server), str(port)])
        trial.env |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "name",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "RAYSL_SCRATCH": str(trial.folder / "scratch"),
        }
        store = pafs.S3FileSystem(
            endpoint_override=f"http://127.0.0.1:{port}",
            access_key="name",
            secret_key="secret",
            allow_bucket_creation=True,
            region="us-east-1",
            request_timeout=2,
            connect_timeout=2,
        )
        for _ in waiting(60):
            with suppress(OSError):
                store.create_dir("bucket")
                break
        config = self.settings(times) | {"output_dir": "s3://bucket/runs"}
        config["method"] |= {"pace_s": 1.0}
        run = Running(trial, config)
        self.ends = threading.Event()
        copying = threading.Thread(target=self._copy, args=(store, run.folder), daemon=True)
        copying.start()
        yield run
        self.ends.set()
        copying.join()

    def _copy(self, store: Any, folder: Path) -> None:
        """Copy the run folder out of the store again and again, for those who watch it."""
        import pyarrow.fs as pafs  # noqa: PLC0415

        chosen = pafs.FileSelector("bucket/runs/trial", recursive=True, allow_not_found=True)
        while not self.ends.wait(0.5):
            with suppress(OSError):
                for info in store.get_file_info(chosen):
                    path = folder / info.path.removeprefix("bucket/runs/trial/")
                    if info.type == pafs.FileType.Directory:
                        path.mkdir(parents=True, exist_ok=True)
                    elif path.suffix in (".jsonl", ".safetensors"):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with store.open_input_stream(info.path) as stream:
                            path.write_bytes(stream.read())

    def harm(self, run: Running) -> float:
        """Take the server away for twenty seconds; the run goes on meanwhile."""
        now = time.time()
        self.server.send_signal(signal.SIGUSR1)
        time.sleep(_OUTAGE_S)
        self.server.send_signal(signal.SIGUSR2)
        return now

    def at_end(self, run: Running) -> dict[str, Any]:
        """Return what the run told of the store."""
        return {"events": [e.get("text") for e in lines(run.folder / "events.jsonl")]}


CASES: dict[str, Case] = {  # in the order of the table
    "train worker": Case("train worker"),
    "train worker of 2": Case("train worker", num_train_workers=2),
    "data worker": DataWorkerLost("data worker"),
    "driver": Case("driver"),
    "controller": Case("controller"),
    "SIGTERM": Case("driver", signal.SIGTERM),
    "Ctrl-C": Case("driver", signal.SIGINT),
    "node lost": NodeLost(num_train_workers=2),
    "job stop": JobStop(),
    "head lost": HeadLost(),
    "process stopped": Hung(in_python=False),
    "step hangs": Hung(in_python=True),
    "flipped bits": FlippedBits(),
    "folder deleted": FolderDeleted(),
    "disk full": DiskFull(),
    "MLflow away": MlflowAway(),
    "store away": StoreAway(),
    "control store lost": ControlStoreLost(),
    "node added": NodeAdded(),
}
