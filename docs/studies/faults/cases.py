"""The faults of the kill table, in its order."""

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

from faults.case import Case
from faults.cluster_cases import (
    ControlStoreLost,
    DataWorkerLost,
    HeadLost,
    JobStop,
    NodeAdded,
    NodeLost,
)
from faults.running import FIRST, Running
from faults.trial import (
    Trial,
    checkpoints,
    end_all,
    free_port,
    lines,
    records,
    waiting,
)

_OUTAGE_S = 20.0


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
