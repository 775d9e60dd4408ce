"""One run of the kill table: its driver, what starts it, and how it goes on after a fault."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from faults.paced import HANG
from faults.trial import Head, Trial, checkpoints, end_all, records, waiting

PACE_S = 0.5
EVERY = 10  # steps between two faults that end processes
FIRST = 12  # step of the first fault: two checkpoints before it, two steps after the newest
_CHECKPOINT_EVERY = 5
_MOST_COMMANDS = 3
Settings = dict[str, Any]


def settings(*, steps: int, num_train_workers: Any) -> Settings:
    """Return the configuration of a run of so many steps."""
    kind = {"count": 2, "size_px": 16, "crop": {"scale": [0.3, 1.0]}, "ops": [{"op": "rotate"}]}
    return {
        "data": {"source": "digits", "views": {"recipe": "custom", "kinds": [kind]}},
        "backbone": {
            "name": "resnet18",
            "width": 0.125,
            "stem": "small",
            "batch_norm": "worker" if num_train_workers in (0, 1) else "sync",
        },
        "method": {"name": "faults.paced", "pace_s": PACE_S},
        "optim": {"name": "adamw", "base_lr": 1e-3},
        "train": {
            "steps": steps,
            "global_batch_size": 32,
            "log_every": 1,
            "checkpoint_every": {"steps": _CHECKPOINT_EVERY},
            "keep_checkpoints": 5,
        },
        "evaluate": {
            "every": None,
            "final": ["knn"],
            "max_train_images": 100,
            "max_test_images": 50,
        },
        "cluster": {
            "num_train_workers": num_train_workers,
            "num_data_workers": 1,
            "cpus_per_train_worker": 0.5,
            "threads_per_train_worker": 1,
            "max_failures": 100,
        },
        "track": {"mlflow": False},
    }


class Outcome(NamedTuple):
    """What became of a run after a fault.

    Attributes:
        by: ``itself``, ``command``, or what happened instead of going on.
        seconds: From the fault to the first step that was never done before; None if never.
        before: The last step before the fault.
        wasted: Steps that were done again.
        statuses: Exit statuses of the drivers that ended.
    """

    by: str
    seconds: float | None
    before: int
    wasted: int | None
    statuses: tuple[int, ...]


class Running:
    """A run that is started, watched, and started again by the same command.

    Args:
        trial: Where it runs.
        config: Its settings.
        overrides: Further settings on the command line.
        head: The lasting cluster that it uses; None starts a Ray of its own.
        as_job: Start it by ``ray job submit``.
        env: Further environment of the driver.
    """

    def __init__(
        self,
        trial: Trial,
        config: Settings,
        *overrides: str,
        head: Head | None = None,
        as_job: bool = False,
        **env: str,
    ) -> None:
        self.trial, self.head, self.as_job, self.env = trial, head, as_job, env
        self.config = trial.folder / "trial.yaml"
        self.config.write_text(json.dumps(config | {"name": "trial"}))  # JSON is YAML
        self.overrides = overrides
        self.steps: int = config["train"]["steps"]
        self.folder = trial.folder / "runs" / "trial"
        self.hang = trial.folder / "hang"
        self.jobs = 0
        self.workers: set[int] = set()  # the train workers before a fault
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the run, or start it again: the command is the same."""
        env = {HANG: str(self.hang), **self.env}
        if self.head is not None:
            env |= {"RAY_ADDRESS": self.head.address, "RAY_AUTH_MODE": "disabled"}
        if not self.as_job:
            self.driver = self.trial.pretrain(self.config, *self.overrides, **env)
            return
        assert self.head is not None
        self.jobs += 1
        command = ["ray", "job", "submit", f"--address=http://127.0.0.1:{self.head.dashboard}"]
        command += [f"--submission-id=job-{self.jobs}", "--", sys.executable, "-m", "raysl"]
        command += ["pretrain", str(self.config), *self.overrides]
        env["RAY_ADDRESS"] = f"http://127.0.0.1:{self.head.dashboard}"
        self.driver = self.trial.start(command, **env)

    def send(self, number: signal.Signals) -> None:
        """Send the driver a signal."""
        assert self.driver is not None
        self.driver.send_signal(number)

    def status(self) -> int | None:
        """Return the driver's exit status, None while it runs."""
        assert self.driver is not None
        return self.driver.poll()

    def step(self) -> int:
        """Return the newest step in the metrics."""
        return max((r["step"] for r in records(self.folder) if "train/loss" in r), default=0)

    def reach(self, step: int, limit_s: float = 1200.0) -> None:
        """Wait until a step is done; the run may end meanwhile, and is started again."""
        starts = 0
        for _ in waiting(limit_s):
            if self.step() >= step:
                self.workers = {p.pid for p in self.trial.find("train worker")}
                return
            if self.status() is not None:
                if starts == _MOST_COMMANDS:
                    break
                self.start()
                starts += 1
        raise TimeoutError(f"step {step} was not reached within {limit_s:g} s")

    def end(self, limit_s: float = 1200.0) -> bool:
        """Wait for the end of the run; return whether it has its encoder."""
        starts = 0
        for _ in waiting(limit_s):
            if self.status() is not None:
                if (self.folder / "encoder.safetensors").exists() and self.status() == 0:
                    return True
                if starts == _MOST_COMMANDS:
                    break
                self.start()
                starts += 1
        return False

    def recover(self, at: float, *, limit_s: float, start_over: bool = False) -> Outcome:
        """Wait for a new step after a fault at a time, and start the run again when it has ended.

        Args:
            at: When the fault was, in seconds since 1970.
            limit_s: How long to wait; then the run waits for ever, and is killed.
            start_over: Whether a run without steps counts as gone on at its first step.
        """
        time.sleep(0.2)  # a step that was being written
        before = 0 if start_over else self.step()
        statuses: list[int] = []
        for _ in waiting(limit_s):
            new = [r for r in records(self.folder) if r["step"] > before and "train/loss" in r]
            new = [r for r in new if r["time"] > at]
            resumed = max((s for s in checkpoints(self.folder) if s <= before), default=0)
            others = bool(new) and self._has_other_workers()
            if new and (others or (not statuses and self.status() in (None, 0))):
                seconds = min(r["time"] for r in new) - at
                by = "command" if statuses else "itself"
                wasted = None if start_over else (before - resumed) * others
                return Outcome(by, round(seconds, 1), before, wasted, tuple(statuses))
            before = max([before, *(r["step"] for r in new)])  # workers that outlived the driver
            if self.status() is not None:
                statuses.append(self.status() or 0)
                if len(statuses) > _MOST_COMMANDS:
                    break
                self.start()
        by = f"not within {limit_s:g} s"
        self.kill()
        self.start()
        return Outcome(by, None, before, None, tuple(statuses))

    def _has_other_workers(self) -> bool:
        """Return whether train workers started since the fault; if not, no step is done again."""
        return bool({p.pid for p in self.trial.find("train worker")} - self.workers)

    def kill(self) -> None:
        """Kill the driver, and all of a Ray that is its own."""
        if self.head is not None:
            assert self.driver is not None
            self.driver.kill()
            end_all(self.trial.mark, ["driver"])
            return
        end_all(self.trial.mark)
        shutil.rmtree(self.trial.ray_folder, ignore_errors=True)  # the address of a dead Ray
        self.trial.ray_folder.mkdir()

    def hit(self, role: str, number: signal.Signals = signal.SIGKILL, which: int = -1) -> float:
        """Send a process of the run a signal; return when."""
        for _ in waiting(30):
            if found := self.trial.find(role):
                now = time.time()
                os.kill(found[which].pid, number)
                return now
        raise TimeoutError(f"there is no {role}")


Fault = Callable[[Running], float]
"""Does harm to a run, and returns when it was done, in seconds since 1970."""
