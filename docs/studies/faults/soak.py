"""Train for hours while something of the run is killed every few minutes; then without.

    python docs/studies/faults/soak.py disturbed FOLDER --hours 2
    python docs/studies/faults/soak.py alone FOLDER --hours 2
    python docs/studies/faults/soak.py report FOLDER --picture docs/soak_memory.png

Both runs, at the same time or one after the other, have the same settings and number of steps, two
train workers, and must end with the same losses and weights, to the bit. ``memory-*.csv`` have the
memory of every process every 10 s, ``faults.jsonl`` a line per fault. The disturbed run is on a Ray
that outlives its drivers (``ray start``), with an MLflow server; the other on a Ray of its own.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.memory import Sampler, as_markdown, draw, read_lives, slopes
from faults.trial import HERE, Head, Trial, differing, end_all, free_port, losses, records

KINDS = ("train worker", "data worker", "controller", "driver", "terminate", "mlflow")
DISTURBED, ALONE = "disturbed", "alone"
_MLFLOW_AWAY_S = 20.0
_GIVE_UP_S = 1200.0  # without a new step after a fault


def settings(arguments: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Return the configuration of both runs."""
    kind = {"count": 2, "size_px": 32, "crop": {"scale": [0.3, 1.0]}}
    kind["ops"] = [{"op": "rotate"}, {"op": "color_jitter"}]
    return {
        "data": {"source": arguments.source, "views": {"recipe": "custom", "kinds": [kind]}},
        "backbone": {"name": "resnet18", "width": 0.25, "stem": "small", "batch_norm": "sync"},
        "method": {"name": "faults.paced", "pace_s": arguments.pace_s},
        "optim": {"name": "adamw", "base_lr": 1e-3},
        "train": {
            "steps": steps,
            "global_batch_size": 64,
            "log_every": 5,
            "checkpoint_every": {"steps": 50},
        },
        "evaluate": {
            "every": {"steps": 500},
            "final": ["knn"],
            "max_train_images": 1000,
            "max_test_images": 500,
        },
        "cluster": {
            "num_train_workers": 2,
            "num_data_workers": 1,
            "cpus_per_train_worker": 0.5,
            "threads_per_train_worker": 1,
            "max_failures": 1000,
        },
    }


class Disturbed:
    """The run that is disturbed: its cluster, its MLflow server and its driver."""

    def __init__(self, trial: Trial, config: Path) -> None:
        self.trial, self.config = trial, config
        self.run_folder = trial.folder / "runs" / DISTURBED
        self.head, self.mlflow_port = Head(trial, num_cpus=4), free_port()
        self.head.start()
        self.start_mlflow()
        self.starts: list[dict[str, Any]] = []
        self.driver = self.start_driver()

    def start_mlflow(self) -> None:
        """Start the MLflow server on its port."""
        command = [sys.executable, "-m", "mlflow", "server", f"--port={self.mlflow_port}"]
        command += [f"--backend-store-uri=sqlite:///{self.trial.folder}/mlflow.db", "--workers=1"]
        self.trial.start(command)

    def start_driver(self) -> "subprocess.Popen[bytes]":
        """Start the run; always the same command."""
        self.starts.append({"time": time.time(), "step": self.step()})
        return self.trial.pretrain(
            self.config,
            f"name={DISTURBED}",
            "track.log_model=false",
            f"track.tracking_uri=http://127.0.0.1:{self.mlflow_port}",
            RAY_ADDRESS=self.head.address,
            RAY_AUTH_MODE="disabled",
        )

    def step(self) -> int:
        """Return the newest step that was logged."""
        return max((r["step"] for r in records(self.run_folder) if "train/loss" in r), default=0)

    def is_finished(self) -> bool:
        """Return whether the driver has ended with results; start it again if without."""
        status = self.driver.poll()
        if status is None:
            return False
        results = self.run_folder / "results.json"
        if status == 0 and results.exists():
            return True
        self.starts[-1] |= {"ended": time.time(), "status": status}
        self.driver = self.start_driver()
        return False

    def hurt(self, kind: str) -> int | None:
        """Do one fault; return the process that it hit, if it was there."""
        if kind == "mlflow":
            end_all(self.trial.mark, [kind])
            time.sleep(_MLFLOW_AWAY_S)
            self.start_mlflow()
            return None
        if kind in ("driver", "terminate"):
            self.driver.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.driver.wait(_GIVE_UP_S)  # after SIGTERM it ends its step first
            return self.driver.pid
        found = [p for p in self.trial.find(kind) if p.run == DISTURBED]
        if not found:
            return None
        os.kill(found[-1].pid, signal.SIGKILL)
        return found[-1].pid


def rounds(seed: int) -> Iterator[str]:
    """Yield kinds of faults at random, each once in a round."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(KINDS, len(KINDS))


def disturb(run: Disturbed, arguments: argparse.Namespace, note: Path) -> None:
    """Do a fault every few minutes until the time is over, then wait for the end of the run."""
    rng, kinds = random.Random(arguments.seed + 1), rounds(arguments.seed)
    end = time.time() + 3600 * arguments.hours
    due = time.time() + rng.uniform(*arguments.every_s)
    while not run.is_finished():
        time.sleep(0.5)
        if not run.step() or not due < time.time() < end:
            continue
        fault: dict[str, Any] = {"kind": next(kinds), "time": time.time()}
        drivers = len(run.starts)
        fault["pid"] = run.hurt(fault["kind"])
        fault["step"] = run.step()
        while run.step() <= fault["step"] and time.time() < fault["time"] + _GIVE_UP_S:
            if run.is_finished():
                break
            time.sleep(0.25)
        fault["seconds"] = round(time.time() - fault["time"], 1)
        fault["goes_on"] = run.step() > fault["step"]
        fault["commands"] = len(run.starts) - drivers
        with open(note, "a") as file:
            file.write(json.dumps(fault) + "\n")
        due = time.time() + rng.uniform(*arguments.every_s)


def prepare(arguments: argparse.Namespace, name: str) -> tuple[Trial, Path]:
    """Return one of the two runs, and the configuration of both."""
    steps = arguments.steps or int(0.7 * 3600 * arguments.hours / arguments.pace_s)
    trial = Trial(arguments.folder.absolute(), arguments.code, name)
    config = trial.folder / "soak.yaml"
    if not config.exists():
        config.write_text(json.dumps(settings(arguments, steps)))  # JSON is YAML
    return trial, config


@contextmanager
def sampled(trial: Trial, name: str) -> Iterator[None]:
    """Sample the memory of a run, and end its processes after the block."""
    sampler = Sampler(trial.mark, name, trial.folder / f"memory-{name}.csv")
    sampler.start()
    try:
        yield
    finally:
        sampler.ends.set()
        sampler.join()
        end_all(trial.mark, run=name)


def run_disturbed(arguments: argparse.Namespace) -> None:
    """Run the disturbed run to its end."""
    trial, config = prepare(arguments, DISTURBED)
    with sampled(trial, DISTURBED):
        run = Disturbed(trial, config)
        disturb(run, arguments, trial.folder / "faults.jsonl")
    (trial.folder / "starts.json").write_text(json.dumps(run.starts, indent=1))
    report(arguments)


def run_alone(arguments: argparse.Namespace) -> None:
    """Run the same run without a fault."""
    trial, config = prepare(arguments, ALONE)
    with sampled(trial, ALONE):
        trial.pretrain(config, f"name={ALONE}", "track.mlflow=false").wait()
    report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Print what the soak showed, also while it goes on, and draw the memory."""
    folder = arguments.folder.absolute()
    note = folder / "faults.jsonl"
    faults = [json.loads(line) for line in note.read_text().splitlines()] if note.exists() else []
    for kind in KINDS:
        of_kind = [f for f in faults if f["kind"] == kind]
        seconds = sorted(f["seconds"] for f in of_kind if f["goes_on"])
        shown = f", median {seconds[len(seconds) // 2]:.0f} s" if seconds else ""
        print(f"{kind}: {len(seconds)} of {len(of_kind)} went on{shown}")
    files = [folder / f"memory-{name}.csv" for name in (DISTURBED, ALONE)]
    lives = [life for path in files if path.exists() for life in read_lives(path)]
    print(as_markdown(slopes(lives)))
    runs = [folder / "runs" / name for name in (DISTURBED, ALONE)]
    steps = [max((r["step"] for r in records(run)), default=0) for run in runs]
    of_run = [life for life in lives if life.run == DISTURBED]
    ends = min(life.times[0] for life in of_run), max(life.times[-1] for life in of_run)
    print(f"{len(faults)} faults in {(ends[1] - ends[0]) / 60:.0f} minutes; steps: {steps}")
    if all((run / "encoder.safetensors").exists() for run in runs):
        found = differing(*runs)
        print(f"weights and losses differ in {len(found)} places {found[:5]}")
    else:  # the runs go on: compare what both have
        one, two = (losses(run) for run in runs)
        both = one.keys() & two.keys()
        wrong = [step for step in both if one[step] != two[step]]
        print(f"losses differ in {len(wrong)} of {len(both)} logged steps so far")
    if arguments.picture:
        draw(lives, faults, arguments.picture)


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["disturbed", "alone", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default="digits", help="data.source of both runs")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="by default what takes so long")
    parser.add_argument("--pace_s", type=float, default=0.5, help="least seconds of a step")
    parser.add_argument("--every_s", type=float, nargs=2, default=(60, 240), help="between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--code", type=Path, default=HERE.parents[2], help="checkout that trains")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    verbs = {"disturbed": run_disturbed, "alone": run_alone, "report": report}
    verbs[arguments.verb](arguments)


if __name__ == "__main__":
    main()
