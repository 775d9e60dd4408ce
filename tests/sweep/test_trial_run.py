"""A trial tells the scheduler each evaluation once, wherever it starts from, and how it ended."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import DivergedError
from raysl.folder.whole import write_json
from raysl.sweep.trial_run import (
    AGAIN,
    LAST,
    run_trial,
    take_over,
)
from raysl.track.run_folder import (
    MetricsFile,
    RunFolder,
    checkpoint_path,
    list_checkpoints,
    read_error,
)
from raysl.train.checkpoint import save_checkpoint
from raysl.train.keep import newest
from raysl.train.loop import Log

METRICS = ("eval/knn_top1", "train/loss")


class Stopped(BaseException):
    """What a scheduler raises in a trial that it stops."""


class Scheduler:
    """Remembers what it is told; stops a trial at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.told: list[Mapping[str, float]] = []
        self.stop_at = stop_at

    def __call__(self, told: Mapping[str, float]) -> None:
        self.told.append(told)
        if told["step"] == self.stop_at:
            raise Stopped

    @property
    def steps(self) -> list[float]:
        return [told["step"] for told in self.told]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "0003")
    found.path.mkdir()
    return found


def training(folder: RunFolder, *, start: int, total: int = 6) -> Any:
    """Evaluates every second step, then writes results."""

    def train(evaluated: Log) -> dict[str, Any]:
        for step in range(start + 2, total + 1, 2):
            evaluated({"eval/knn_top1": step / 10, "train/epoch": step / 2, "other": 1.0}, step)
        write_json(folder.results, {"knn_top1": total / 10})
        return {}

    return train


def test_tells_each_evaluation_with_step_epoch_and_the_metrics_asked_for(folder: RunFolder) -> None:
    scheduler = Scheduler()
    run_trial(
        folder,
        metrics=METRICS,
        total_steps=6,
        report=scheduler,
        train=training(folder, start=0),
    )
    assert scheduler.told == [
        {"step": 2.0, "epoch": 1.0, "eval/knn_top1": 0.2},
        {"step": 4.0, "epoch": 2.0, "eval/knn_top1": 0.4},
        {"step": 6.0, "epoch": 3.0, "eval/knn_top1": 0.6, LAST: 1.0},
    ]


def test_tells_the_last_evaluation_when_the_results_are_written(folder: RunFolder) -> None:
    scheduler = Scheduler(stop_at=6)
    with pytest.raises(Stopped):
        run_trial(
            folder,
            metrics=METRICS,
            total_steps=6,
            report=scheduler,
            train=training(folder, start=0),
        )
    assert folder.results.exists()


def test_a_stopped_trial_trains_no_further(folder: RunFolder) -> None:
    scheduler = Scheduler(stop_at=4)
    with pytest.raises(Stopped):
        run_trial(
            folder,
            metrics=METRICS,
            total_steps=6,
            report=scheduler,
            train=training(folder, start=0),
        )
    assert scheduler.steps == [2, 4]
    assert not folder.results.exists()
    assert read_error(folder) is None


def test_tells_what_was_measured_before_the_checkpoint_again_and_no_more(
    folder: RunFolder,
) -> None:
    metrics = MetricsFile(folder.metrics, start_step=0)
    for step in (2, 4, 6):
        metrics.log({"eval/knn_top1": step / 10, "train/epoch": step / 2}, step=step)
    metrics.log({"train/loss": 1.0, "train/epoch": 1.5}, step=3)
    metrics.close()
    save_checkpoint(folder.checkpoints, {}, step=4, keep=newest(1))
    scheduler = Scheduler()
    run_trial(
        folder,
        metrics=METRICS,
        total_steps=6,
        report=scheduler,
        train=training(folder, start=4),
    )
    assert scheduler.steps == [2, 4, 6]
    assert [AGAIN in told for told in scheduler.told] == [True, True, False]
    assert [LAST in told for told in scheduler.told] == [False, False, True]


def test_an_error_of_raysl_ends_the_trial_and_is_kept_until_it_runs_again(
    folder: RunFolder,
) -> None:
    def diverge(evaluated: Log) -> dict[str, Any]:
        raise DivergedError("train/loss is nan at step 3")

    run_trial(folder, metrics=METRICS, total_steps=6, report=Scheduler(), train=diverge)
    assert read_error(folder) == {
        "error": "DivergedError",
        "message": "train/loss is nan at step 3",
    }
    run_trial(
        folder,
        metrics=METRICS,
        total_steps=6,
        report=Scheduler(),
        train=training(folder, start=0),
    )
    assert read_error(folder) is None


def test_an_error_that_is_not_raysls_is_for_the_scheduler_to_retry(folder: RunFolder) -> None:
    def die(evaluated: Log) -> dict[str, Any]:
        raise OSError("the node is going down")

    with pytest.raises(OSError, match="going down"):
        run_trial(folder, metrics=METRICS, total_steps=6, report=Scheduler(), train=die)
    assert read_error(folder) is None


class TestTakeOver:
    @pytest.fixture
    def donor(self, tmp_path: Path) -> RunFolder:
        found = RunFolder(tmp_path / "0007")
        for step in (20, 40):
            path = checkpoint_path(found.checkpoints, step)
            path.mkdir(parents=True)
            (path / "state.pt").write_text(f"donor {step}")
        return found

    def test_replaces_the_trials_own_checkpoints_even_newer_ones(
        self, folder: RunFolder, donor: RunFolder
    ) -> None:
        checkpoint_path(folder.checkpoints, 60).mkdir(parents=True)
        assert take_over(folder, str(donor.path), step=40, total_steps=80) == 40
        assert list_checkpoints(folder.checkpoints) == [40]
        state = checkpoint_path(folder.checkpoints, 40) / "state.pt"
        assert state.read_text() == "donor 40"
        assert list_checkpoints(donor.checkpoints) == [20, 40]

    def test_takes_the_newest_before_a_checkpoint_that_is_gone(
        self, folder: RunFolder, donor: RunFolder
    ) -> None:
        assert take_over(folder, str(donor.path), step=30, total_steps=80) == 20
        assert list_checkpoints(folder.checkpoints) == [20]

    def test_leaves_the_trial_as_it_is_if_the_donor_has_none(
        self, folder: RunFolder, tmp_path: Path
    ) -> None:
        checkpoint_path(folder.checkpoints, 60).mkdir(parents=True)
        assert take_over(folder, str(tmp_path / "empty"), step=30, total_steps=80) == 0
        assert list_checkpoints(folder.checkpoints) == [60]

    def test_never_takes_what_leaves_nothing_to_train(
        self, folder: RunFolder, donor: RunFolder
    ) -> None:
        assert take_over(folder, str(donor.path), step=40, total_steps=40) == 20
        assert take_over(folder, str(donor.path), step=40, total_steps=20) == 0
        assert list_checkpoints(folder.checkpoints) == [20]
