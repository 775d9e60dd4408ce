"""Train workers in groups, each with an execution of Ray Data of its own."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main
from raysl.track.run_folder import RunFolder, read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "undrawn")]

ACTORS = ("SplitCoordinator", "DatasetManager", "RayTrainWorker", "MakeItems")


def records(name: str) -> Iterator[tuple[int, float]]:
    for record in read_metrics(RunFolder(Path("runs") / name).metrics):
        if "train/loss" in record:
            yield int(record["step"]), record["train/loss"]


def wait_for_step(name: str, step: int) -> None:
    deadline = time.monotonic() + 400
    while max((s for s, _ in records(name)), default=0) < step and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_run_of_two_executions_whose_coordinator_is_killed_gives_the_losses_of_one(
    run_yaml: Callable[[str], Path],
    processes: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray Train itself ends only the execution of rank 0, and only if it is not the killed one."""
    options = ["cluster.num_train_workers=2", "cluster.num_data_workers=2"]
    options += ["train.steps=40", "evaluate.every=null"]
    options += ["train.checkpoint_every={steps: 5}"]
    assert main(["pretrain", str(run_yaml("one")), *options]) == 0
    monkeypatch.setattr("raysl.run.ray_data.MOST_RANKS", 1)
    seen: list[tuple[int, ...]] = []
    others = {process.pid for name in ACTORS for process in processes(name)}  # of earlier tests

    def own(name: str) -> list[Any]:
        return [process for process in processes(name) if process.pid not in others]

    def count() -> None:
        # Data workers end when they have made the last block.
        seen.append(tuple(len(own(name)) for name in ACTORS[:3]))

    def disturb() -> None:
        wait_for_step("two", 8)
        count()
        os.kill(max(own("SplitCoordinator"), key=lambda p: p.pid).pid, signal.SIGKILL)
        wait_for_step("two", 30)
        count()

    disturber = threading.Thread(target=disturb, daemon=True)
    disturber.start()
    assert main(["pretrain", str(run_yaml("two")), *options]) == 0
    disturber.join(timeout=5)
    # Two executions before and after; those of the first start have ended with all their actors.
    assert seen == [(2, 1, 2)] * 2
    assert list(records("two")) == list(records("one"))
    assert len(list(records("two"))) == 40
    deadline = time.monotonic() + 60
    while any(own(name) for name in ACTORS) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [own(name) for name in ACTORS] == [[]] * len(ACTORS)
