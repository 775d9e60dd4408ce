import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import RunFolderError
from raysl.folder.whole import write_json
from raysl.sweep.config import MetricConfig
from raysl.sweep.space import Candidate
from raysl.sweep.trial import (
    SweepFolder,
    read_candidate,
    read_trial,
    read_trials,
    trial_file,
    write_trial,
)
from raysl.track.run_folder import RunFolder

METRIC = MetricConfig(also=("train/loss", "train/effective_rank"))
CANDIDATE = Candidate(3, {"method": "moco"}, {"method": {"name": "moco"}}, "base.yaml")


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path / "s")


@pytest.fixture
def folder(sweep: SweepFolder) -> RunFolder:
    """A trial that waits."""
    folder = sweep.trial(3)
    write_trial(folder, CANDIDATE)
    return folder


def _measure(folder: RunFolder, *records: Mapping[str, Any]) -> None:
    text = "".join(json.dumps({"time": 0.0, **record}) + "\n" for record in records)
    folder.metrics.write_text(text)


def _read(folder: RunFolder, metric: MetricConfig = METRIC) -> Any:
    trial = read_trial(folder, metric)
    assert trial is not None
    return trial


class TestStatus:
    def test_a_trial_waits_until_something_is_logged(self, folder: RunFolder) -> None:
        trial = _read(folder)
        assert (trial.number, trial.params, trial.status) == (3, {"method": "moco"}, "waiting")
        assert (trial.curve, trial.metric, trial.also) == ((), None, {})
        assert (trial.epoch, trial.seconds, trial.error) == (0.0, 0.0, None)
        _measure(folder, {"step": 1, "time/first_step_at": 5.0})
        assert _read(folder).status == "running"

    def test_it_has_finished_when_its_results_are_there(self, folder: RunFolder) -> None:
        write_json(folder.results, {"knn_top1": 0.5})
        assert _read(folder).status == "finished"

    def test_stopped_at_the_very_end_it_has_finished(self, folder: RunFolder) -> None:
        write_trial(folder, CANDIDATE, status="stopped")
        assert _read(folder).status == "stopped"
        write_json(folder.results, {"knn_top1": 0.5})
        assert _read(folder).status == "finished"

    def test_one_that_failed_says_why(self, folder: RunFolder) -> None:
        write_trial(folder, CANDIDATE, status="failed", error="DivergedError: the loss is nan")
        trial = _read(folder)
        assert (trial.status, trial.error) == ("failed", "DivergedError: the loss is nan")

    def test_one_that_is_tried_again_forgets_that_it_failed(self, folder: RunFolder) -> None:
        write_trial(folder, CANDIDATE, status="failed", error="lost")
        write_trial(folder, CANDIDATE)
        trial = _read(folder)
        assert (trial.status, trial.error) == ("waiting", None)


class TestCurve:
    def test_evaluations_get_their_epoch_from_lines_that_have_one(self, folder: RunFolder) -> None:
        _measure(
            folder,
            {"step": 1, "time/first_step_at": 5.0},
            {"step": 5, "eval/knn_top1": 0.25},
            {"step": 10, "train/loss": 2.0, "train/epoch": 1.0, "time/train_s": 3.0},
            {"step": 15, "eval/knn_top1": 0.75},
            {"step": 20, "train/loss": 1.0, "train/epoch": 2.0, "time/train_s": 4.5},
        )
        trial = _read(folder)
        assert trial.curve == ((0.5, 0.25), (1.5, 0.75))
        assert trial.metric == 0.75
        assert trial.also == {"train/loss": 1.0}
        assert (trial.epoch, trial.seconds) == (2.0, 7.5)

    def test_what_is_not_finite_is_left_out(self, folder: RunFolder) -> None:
        _measure(
            folder,
            {"step": 10, "train/epoch": 1.0, "eval/knn_top1": 0.5, "train/loss": 2.0},
            {"step": 20, "train/epoch": 2.0, "eval/knn_top1": math.nan, "train/loss": math.inf},
        )
        trial = _read(folder)
        assert trial.curve == ((1.0, 0.5),)
        assert trial.also == {"train/loss": 2.0}
        assert trial.epoch == 2.0

    def test_a_metric_that_is_measured_at_the_end_only_is_a_curve_of_one(
        self, folder: RunFolder
    ) -> None:
        _measure(
            folder,
            {"step": 20, "train/epoch": 2.0, "train/loss": 1.0},
            {"step": 20, "final/linear_lbfgs_top1": 0.9},
        )
        assert _read(folder, MetricConfig(name="final/linear_lbfgs_top1")).curve == ((2.0, 0.9),)

    @pytest.mark.parametrize("key", ["final/linear_lbfgs_top1", "final/linear_top1"])
    def test_a_trial_of_version_0_1_wrote_linear_for_linear_lbfgs(
        self, folder: RunFolder, key: str
    ) -> None:
        _measure(folder, {"step": 20, "train/epoch": 2.0, key: 0.9})
        assert _read(folder, MetricConfig(name="final/linear_lbfgs_top1")).metric == 0.9

    def test_before_the_first_line_with_an_epoch_there_is_none(self, folder: RunFolder) -> None:
        _measure(folder, {"step": 5, "eval/knn_top1": 0.25})
        assert _read(folder).curve == ()

    def test_a_line_that_is_being_written_is_left_out(self, folder: RunFolder) -> None:
        _measure(folder, {"step": 10, "train/epoch": 1.0, "eval/knn_top1": 0.5})
        with open(folder.metrics, "a", encoding="utf-8") as file:
            file.write('{"step": 20, "train/ep')
        assert _read(folder).metric == 0.5


class TestFolders:
    def test_trials_come_in_the_order_of_their_numbers(self, sweep: SweepFolder) -> None:
        for number in (10, 2, 1000):
            write_trial(sweep.trial(number), CANDIDATE._replace(number=number))
        (sweep.trials / "notes").mkdir()
        assert [trial.number for trial in read_trials(sweep, METRIC)] == [2, 10, 1000]
        assert sweep.trial(2).path == sweep.path / "trials" / "0002"

    def test_a_sweep_that_has_not_begun_has_no_trials(self, sweep: SweepFolder) -> None:
        assert read_trials(sweep, METRIC) == []

    def test_a_candidate_comes_back_as_it_was(self, folder: RunFolder) -> None:
        write_trial(folder, CANDIDATE, status="stopped")
        assert read_candidate(folder) == CANDIDATE

    def test_a_folder_without_one_is_no_trial(self, sweep: SweepFolder) -> None:
        assert read_candidate(sweep.trial(0)) is None
        assert read_trial(sweep.trial(0), METRIC) is None

    def test_a_file_of_another_version_says_so(self, folder: RunFolder) -> None:
        write_json(trial_file(folder), {"number": 1})
        with pytest.raises(RunFolderError, match=r"trial\.json: no base, params, values; another"):
            read_candidate(folder)

    def test_knows_its_run_in_mlflow(self, folder: RunFolder) -> None:
        write_json(folder.mlflow, {"run_id": "abc"})
        assert _read(folder).mlflow_run_id == "abc"

    def test_is_held_by_one_process(self, sweep: SweepFolder) -> None:
        with (
            sweep.locked(),
            pytest.raises(RunFolderError, match="wait for it"),
            SweepFolder(sweep.path).locked(),
        ):
            pass
