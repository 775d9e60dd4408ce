"""What a sweep leaves behind: a best run that trains as it is, and results for scripts."""

from pathlib import Path
from typing import Any

import pytest

from raysl.config.yaml_text import to_yaml
from raysl.evaluate.registry import FINAL
from raysl.folder.whole import write_json
from raysl.run.recipe import load_run
from raysl.sweep.config import SweepConfig
from raysl.sweep.results import (
    best_run,
    failures_of,
    next_line,
    results_of,
    write_best,
)
from raysl.sweep.space import Candidate, run_config
from raysl.sweep.summary import summarise
from raysl.sweep.trial import Change, SweepFolder, read_trials, write_change, write_trial
from raysl.track.config import TrackConfig
from raysl.track.run_folder import MetricsFile

BASE = """\
data: {source: digits}
method: {name: simclr}
train: {epochs: 3, global_batch_size: 32}
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepConfig:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return SweepConfig(
        name="s",
        base=(str(tmp_path / "base.yaml"),),
        track=TrackConfig(experiment="mine"),
    )


@pytest.fixture
def folder(sweep: SweepConfig, tmp_path: Path) -> SweepFolder:
    """Three trials: one finished, a better one finished, one that failed."""
    found = SweepFolder(tmp_path / "runs" / "s")
    for number, (temperature, accuracy) in enumerate([(0.1, 0.4), (0.2, 0.6), (0.5, None)]):
        values = {"method.temperature": temperature}
        candidate = Candidate(number, values, values, sweep.base[0])
        run = found.trial(number)
        run.path.mkdir(parents=True)
        config = run_config(sweep, candidate, folder=found.path)
        run.config.write_text(to_yaml(config.model_dump(mode="json")))
        if accuracy is None:
            write_trial(run, candidate, status="failed", error="DivergedError: nan")
            continue
        write_trial(run, candidate)
        metrics = MetricsFile(run.metrics, start_step=0)
        metrics.log({"eval/knn_top1": accuracy, "train/epoch": 3.0}, step=9)
        metrics.close()
        write_json(run.results, {"knn_top1": accuracy})
    return found


@pytest.fixture
def outcome(sweep: SweepConfig, folder: SweepFolder) -> tuple[list[Any], Any]:
    trials = read_trials(folder, sweep.metric)
    return trials, summarise(trials, sweep.metric)


def test_results_count_trials_by_how_they_ended_and_name_the_best(
    sweep: SweepConfig, folder: SweepFolder, outcome: tuple[list[Any], Any]
) -> None:
    results = results_of(sweep, folder, *outcome)
    counts = {key: results[key] for key in ("trials", "finished", "failed", "stopped_early")}
    assert counts == {"trials": 3, "finished": 2, "failed": 1, "stopped_early": 0}
    assert results["best_params"] == {"method.temperature": 0.2}
    assert results["best_metric"] == 0.6
    assert results["best_config"] == str(folder.best)


def test_the_best_run_is_the_trial_measured_in_full_and_tracked(
    sweep: SweepConfig, folder: SweepFolder, outcome: tuple[list[Any], Any]
) -> None:
    write_best(sweep, folder, outcome[1])
    best = load_run(folder.best)
    assert best.method.temperature == 0.2
    assert (best.name, best.output_dir) == ("s-best", "runs")
    assert best.evaluate.final == FINAL
    assert best.track.mlflow
    assert best.track.experiment == "mine"


def test_the_best_run_has_the_settings_that_changed_in_flight(
    sweep: SweepConfig, folder: SweepFolder
) -> None:
    key = "method.temperature"
    for step, value in ((0, 0.2), (3, 0.25), (9, 0.3)):  # measured at step 9, by which 0.3 is new
        write_change(folder.trial(1), Change(step, {key: value}, {key: value}))
    assert best_run(sweep, folder.trial(1)).method.temperature == 0.25
    (_, trial, _) = read_trials(folder, sweep.metric)
    assert trial.params == {key: 0.25}


def test_the_next_line_trains_the_best_ten_times_as_long(
    sweep: SweepConfig, folder: SweepFolder, outcome: tuple[list[Any], Any]
) -> None:
    assert next_line(sweep, folder, outcome[1]) == (
        "raysl pretrain runs/s/best.yaml train.epochs=30"
    )


def test_without_a_measured_trial_there_is_no_best(sweep: SweepConfig, tmp_path: Path) -> None:
    empty = SweepFolder(tmp_path / "runs" / "empty")
    empty.path.mkdir(parents=True)
    summary = summarise([], sweep.metric)
    write_best(sweep, empty, summary)
    assert not empty.best.exists()
    assert next_line(sweep, empty, summary) is None
    assert results_of(sweep, empty, [], summary)["best_params"] is None


class TestWhatFailed:
    def test_is_nothing_if_some_diverged(
        self, sweep: SweepConfig, outcome: tuple[list[Any], Any]
    ) -> None:
        assert failures_of(sweep, outcome[0], {}) == []

    def test_is_trials_that_were_lost(
        self, sweep: SweepConfig, outcome: tuple[list[Any], Any]
    ) -> None:
        assert failures_of(sweep, outcome[0], {2: "no process", 0: "no process"}) == [
            "trials were lost: 0000, 0002 (no process); the same command resumes them"
        ]

    def test_is_trials_that_died(self, sweep: SweepConfig, outcome: tuple[list[Any], Any]) -> None:
        trials = [*outcome[0][:2], outcome[0][2]._replace(error="MemoryError: no memory")]
        assert failures_of(sweep, trials, {}) == [
            "1 of 3 trials failed: 0002 (MemoryError: no memory)"
        ]

    def test_is_that_all_diverged(self, sweep: SweepConfig, outcome: tuple[list[Any], Any]) -> None:
        trials = [outcome[0][2]._replace(number=n, metric=0.1) for n in range(2)]
        assert failures_of(sweep, trials, {}) == [
            "no trial has eval/knn_top1, so none is the best: 2 of 2 diverged; lower optim.base_lr"
        ]
