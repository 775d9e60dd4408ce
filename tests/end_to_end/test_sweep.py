"""A sweep as a person runs it: checked, run, killed, gone on with, found in MLflow."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from raysl.cli import main
from raysl.config.load import read_mapping
from raysl.run.recipe import load_run
from raysl.track.run_folder import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

Sweep = Callable[..., tuple[int, dict[str, Any], str]]

BASE = """\
data:
  source: digits
  limit: 320
  views:
    recipe: custom
    kinds: [{count: 2, size_px: 16, crop: {scale: [0.5, 1.0]}, ops: [{op: rotate}]}]
backbone: {name: resnet18, stem: small, width: 0.125}
method: {name: moco, queue_length: 64, ema_momentum: 0.9}
optim: {name: adamw, base_lr: 1.0e-3}
train: {epochs: 4, global_batch_size: 32, checkpoint_every: {epochs: 1}}
evaluate: {max_train_images: 300, max_test_images: 200}
"""
SWEEP = """\
base: base.yaml
space:
  method.temperature: {grid: [0.1, 0.5]}
  method.queue_length: {grid: [64]}
  optim.base_lr: {grid: [1.0e-3, 1.0e+30]}
search: {name: grid}
metric: {also: [train/effective_rank]}
scheduler: {name: asha, grace_epochs: 2, reduction_factor: 2}
"""
AT_A_TIME = ["resources.trials_at_a_time=2"]  # as many as there are cores at the least


@pytest.fixture
def sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """Run `raysl sweep sweep.yaml` on the Ray that all tests share: status, results, stderr."""

    def run(*overrides: str) -> tuple[int, dict[str, Any], str]:
        status = main(["sweep", "sweep.yaml", *AT_A_TIME, *overrides, "--json"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out.splitlines()[-1]), captured.err

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


@pytest.mark.usefixtures("empty_store_here")
def test_a_sweep_that_is_killed_goes_on_and_loses_and_repeats_nothing(
    folder: Path, sweep: Sweep, kill_in_the_middle: Callable[..., None]
) -> None:
    trials = folder / "runs" / "sweep" / "trials"

    def one_finished_and_another_saved() -> bool:
        finished = [path.parent for path in trials.glob("*/results.json")]
        saved = {path.parents[1] for path in trials.glob("*/checkpoints/step-*")}
        return bool(finished) and bool(saved - set(finished))

    kill_in_the_middle(["sweep", "sweep.yaml", *AT_A_TIME], one_finished_and_another_saved)
    finished = {path: path.stat().st_mtime_ns for path in trials.glob("*/results.json")}
    measured = {
        path: [r["step"] for r in read_metrics(path) if "eval/knn_top1" in r]
        for path in trials.glob("*/metrics.jsonl")
    }

    status, results, said = sweep()  # on another cluster than the one that was killed

    assert status == 0, said
    assert results["trials"] == 4
    assert results["failed"] == 2  # a learning rate at which everything diverges
    assert results["finished"] + results["stopped_early"] == 2
    assert results["best_params"]["optim.base_lr"] == 1e-3
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written
    for path, steps in measured.items():  # nothing measured before is lost, nothing comes twice
        now = [r["step"] for r in read_metrics(path) if "eval/knn_top1" in r]
        assert now == sorted(set(now))
        assert set(steps) <= set(now) or path.parent / "results.json" not in finished

    runs = runs_in_mlflow(folder)
    (parent,) = [run for run in runs if run.info.run_id == results["parent_run_id"]]
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(runs) == 5
    assert sorted(run.data.tags["trial"] for run in children) == [str(n) for n in range(4)]
    assert [run.data.tags["status"] for run in children].count("failed") == 2
    assert {run.info.status for run in children} == {"FINISHED", "FAILED"}
    assert parent.info.status == "FINISHED"
    for run in children:
        assert run.data.params["method.temperature"] in ("0.1", "0.5")
        assert run.data.params["method.queue_length"] == "64"
        if run.data.tags["status"] == "failed":
            assert "DivergedError" in run.data.tags["error"]
    files = {f.path for f in MlflowClient(store(folder)).list_artifacts(parent.info.run_id)}
    assert {"report.html", "best.yaml", "summary.json", "pictures"} <= files

    best = load_run(Path(results["best_config"]))
    assert best.method.temperature == results["best_params"]["method.temperature"]
    assert best.evaluate.final == ("knn", "linear_lbfgs", "few_shot")

    status, again, said = sweep()
    assert (status, "this sweep is finished" in said) == (0, True), said
    assert again["parent_run_id"] == results["parent_run_id"]
    assert len(runs_in_mlflow(folder)) == 5


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def runs_in_mlflow(folder: Path) -> list[Run]:
    client = MlflowClient(store(folder))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))


def test_a_trial_of_two_workers_runs_below_ray_train(
    folder: Path, sweep: Sweep, undrawn: None
) -> None:
    status, results, said = sweep(
        "name=nested",
        "space={method.temperature: {grid: [0.1]}}",
        "scheduler={name: none}",
        "budget.epochs=1",
        "cluster.num_train_workers=2",
        "cluster.cpus_per_train_worker=0.5",
        "cluster.num_data_workers=1",
        "track.mlflow=false",
    )
    assert status == 0, said
    assert (results["trials"], results["finished"]) == (1, 1)
    assert results["parent_run_id"] is None
    config = read_mapping(folder / "runs" / "nested" / "trials" / "0000" / "config.yaml")
    assert config["cluster"]["num_train_workers"] == 2


@pytest.mark.parametrize(
    ("scheduler", "search", "epochs"),
    [
        (
            "{name: hyperband, max_evaluations: 4, reduction_factor: 2}",
            "{name: optuna, startup_trials: 2}",
            4,
        ),
        ("{name: pbt, perturb_every_epochs: 1, quantile: 0.5}", "{name: random}", 2),
    ],
    ids=["hyperband-optuna", "pbt-random"],
)
def test_every_scheduler_and_search_brings_all_trials_to_an_end(
    sweep: Sweep, undrawn: None, scheduler: str, search: str, epochs: int
) -> None:
    if "optuna" in search and importlib.util.find_spec("optuna") is None:
        search = "{name: random}"  # the scheduler is tested all the same
    status, results, said = sweep(
        "space={optim.base_lr: {log_uniform: [1.0e-4, 1.0e-2]}}",
        f"scheduler={scheduler}",
        f"search={search}",
        "budget.trials=4",
        f"budget.epochs={epochs}",
        "track.mlflow=false",
    )
    assert status == 0, said
    assert results["trials"] == 4
    assert results["finished"] + results["stopped_early"] == 4
    assert results["finished"] >= 1
    if "hyperband" in scheduler:  # one bracket of four: at each rung one of two goes on
        assert (results["finished"], results["stopped_early"]) == (1, 3)
    assert 1e-4 <= results["best_params"]["optim.base_lr"] <= 1e-2
