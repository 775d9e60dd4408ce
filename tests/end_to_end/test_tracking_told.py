"""What MLflow does not take, as a command says it: before any work, with what mends it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from raysl.cli import main

SMALL = [
    "train.steps=1",
    "evaluate.every=null",
    "evaluate.final=[knn]",
    "backbone={name: resnet18, stem: small, width: 0.125}",
    "data.views.kinds.0.size_px=16",
]
TRACK = ["track.mlflow=true", "track.log_model=false"]


@pytest.mark.usefixtures("empty_store_here")
def test_a_folder_of_files_is_told_first_and_its_cure_sends_the_run(
    run_yaml: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["pretrain", str(run_yaml("r")), *SMALL, *TRACK]
    assert main([*command, "track.tracking_uri=mlruns", "--json"]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    told = next(n for n, line in enumerate(lines) if "MLflow (mlruns) accepts nothing" in line)
    assert told < next(n for n, line in enumerate(lines) if line.startswith("step "))
    assert "Work continues" in lines[told]
    assert "track.tracking_uri=sqlite:///mlflow.db" in lines[told]
    assert "What to do: give a database" in lines[-1]  # again, at the end
    assert json.loads(captured.out.splitlines()[-1])["mlflow_run_id"] is None
    assert "could not be drawn" not in captured.err  # nearest neighbours alone keep no features
    page = Path("runs/r/report.html").read_text()
    assert "Map of the features" not in page
    assert "was not drawn" not in page

    monkeypatch.setattr("raysl.run.page.draw_all", lambda *_, **__: [])  # looked at above
    assert main([*command, "track.tracking_uri=sqlite:///mlflow.db", "--json"]) == 0
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])["mlflow_run_id"]
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "train/loss" in run.data.metrics

    again = [*command, "train.steps=2", "--extend", "track.tracking_uri=sqlite:///mlflow.db"]
    assert main(again) == 0
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_id)  # the same one
    assert run.data.params["train.steps"] == "1"
    assert run.data.tags["train.steps"] == "2"
    assert run.data.tags["extended.1"].startswith("extended after step 1 from 1 to 2 steps")
    history = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(run_id, "train/lr")
    assert sorted(metric.step for metric in history) == [1, 2]


@pytest.mark.usefixtures("undrawn")
def test_what_an_evaluation_leaves_of_a_runs_images_is_told(
    run_yaml: Callable[[str], Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(run_yaml("r")), *SMALL]) == 0
    own = ["--protocols", "knn", "cluster.num_train_workers=0", "track.mlflow=false"]
    assert main(["evaluate", "runs/r", f"data.source={photos}", *own]) == 0
    told = "data.source names other images than r uses; settings of the old images are dropped: "
    assert f"{told}data.limit=160\n" in capsys.readouterr().err
    assert main(["evaluate", "runs/r", *own]) == 0
    assert "left out" not in capsys.readouterr().err
