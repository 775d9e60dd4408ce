"""Fine-tuning, distilling and whole pipelines from the command line: stop, go on, make mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import raysl
from raysl.cli import main
from raysl.track.run_folder import RunFolder, checkpoint_path, list_checkpoints, read_metrics

TINY = ["backbone={name: resnet18, stem: small, width: 0.125}"]
SHORT = ["train.global_batch_size=16", "evaluate.max_test_images=100"]
PIPELINE = """\
base: base.yaml
set: {evaluate.final: knn, evaluate.every: null, train.log_every: 5}
finetune:
  - labels: [0.2]
    head_layers: [0, 1]
    set: &short {train.steps: 4, train.global_batch_size: 16, optim.name: sgd}
distill:
  - {name: same, teacher: best, set: *short}
  - {name: small, teacher: same, set: {train.steps: 2, backbone.width: 0.25}}
"""
MISTAKES: list[tuple[list[str], str]] = [
    (["finetune", "runs/none"], "no finished run and no encoder file"),
    (["finetune", "runs/base", "method.head_layers=4"], "use at most 3"),
    (["finetune", "runs/base", "data.labels.fraction=2"], "data.labels.fraction"),
    (["finetune", "runs/base", "method.head=nowhere"], "method.head=nowhere: no such file"),
    (["finetune", "base.yaml"], "method simclr pretrains; give method supervised"),
    (["distill", "runs/base"], "no run with a classifier.safetensors in it"),
]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.fixture
def base(run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished pretraining with a head of three layers."""
    config = str(run_yaml("base"))
    head = ["method.projection_layers=3", "evaluate.final=knn", "train.steps=2"]
    return Path(printed(capsys, "pretrain", config, *TINY, *head)["run_dir"])


def finetune(capsys: pytest.CaptureFixture[str], origin: Path, *overrides: str) -> dict[str, Any]:
    return printed(capsys, "finetune", str(origin), *SHORT, "data.labels.fraction=0.2", *overrides)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return raysl.load_classifier(folder).state_dict()


class TestFinetuneAndDistill:
    def test_one_after_the_other(self, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tuned = finetune(capsys, base, "train.steps=4", "evaluate.every={steps: 2}")
        folder = RunFolder(Path(tuned["run_dir"]))
        assert folder.path == base.with_name("base-finetuned-20percent-layer1")
        labels = json.loads(folder.labels.read_text())
        records = read_metrics(folder.metrics)
        assert len(labels["rows"]) == tuned["num_labels"] == 32
        evaluated = {r["step"]: r["eval/top1"] for r in records if "eval/top1" in r}
        assert set(evaluated) == {2, 4}
        assert evaluated[4] == tuned["top1"] == records[-1]["final/top1"]
        assert "right in" in folder.report.read_text()

        model = raysl.load_classifier(folder.path)
        assert model.class_names == [str(number) for number in range(10)]
        plain = raysl.load_encoder(folder.path)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model.encoder(images), plain(images))

        student = printed(
            capsys, "distill", str(folder.path), *SHORT, "train.steps=3", "backbone.width=0.25"
        )
        small = raysl.load_classifier(student["run_dir"])
        assert small.encoder.embed_dim == 128
        assert small.class_names == model.class_names
        assert not any("teacher" in name for name in small.state_dict())

    def test_one_that_was_stopped_ends_with_the_same_weights(
        self, base: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        steps = ["train.steps=6", "train.checkpoint_every={steps: 2}", "train.keep_checkpoints=9"]
        mixed = ["method.mixup=0.8", "method.cutmix=1.0", "optim.name=adamw"]
        whole = Path(finetune(capsys, base, *steps, *mixed)["run_dir"])
        expected = weights(whole)
        folder = RunFolder(whole)
        assert list_checkpoints(folder.checkpoints) == [2, 4, 6]
        for file in (folder.results, folder.classifier, folder.encoder):
            file.unlink()
        for step in (4, 6):
            shutil.rmtree(checkpoint_path(folder.checkpoints, step))
        finetune(capsys, base, *steps, *mixed)
        for name, value in weights(whole).items():
            assert torch.equal(value, expected[name]), name

    def test_mistakes_are_told_at_once(
        self, base: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert base.exists()
        for arguments, message in MISTAKES:
            assert main(arguments) == 1
            error = capsys.readouterr().err
            assert message in error
            assert "Traceback" not in error


@pytest.mark.slow
def test_a_pipeline_is_run_once_and_goes_on_where_it_stopped(
    run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_yaml("base")
    Path("mine.yaml").write_text(PIPELINE)
    given = ["pipeline", "mine.yaml", *TINY, "pretrain.train.steps=2"]
    given += ["pretrain.method.projection_layers=3"]
    given += ["track.tracking_uri=sqlite:///tracked.db", "track.log_model=false"]
    first = printed(capsys, *given)
    names = [row["step"] for row in first["steps"]]
    assert names == [
        "pretrain",
        "finetune-20percent-layer0",
        "finetune-20percent-layer1",
        "distill-20percent-same",
        "distill-20percent-small",
    ]
    assert all(0 <= row["top1"] <= 1 for row in first["steps"])
    tuned = first["steps"][1:3]
    assert first["steps"][4]["teacher"] == max(tuned, key=lambda row: row["top1"])["step"]
    folder = Path(first["pipeline_dir"])
    assert json.loads((folder / "pipeline.json").read_text())["finished"] == 5
    assert "finetune-20percent-layer1" in (folder / "report.html").read_text()
    _check_tracked(first)

    shutil.rmtree(folder / names[-1])  # as if it had been stopped before its last step
    before = {name: (folder / name / "metrics.jsonl").stat().st_mtime_ns for name in names[:-1]}
    again = printed(capsys, *given)
    after = {name: (folder / name / "metrics.jsonl").stat().st_mtime_ns for name in names[:-1]}
    assert before == after
    assert [row["top1"] for row in again["steps"]] == [row["top1"] for row in first["steps"]]
    assert again["mlflow_run_id"] == first["mlflow_run_id"]

    assert main([*given, "pretrain.optim.base_lr=0.2"]) == 1
    assert "holds a pipeline with another pretrain" in capsys.readouterr().err


def _check_tracked(results: dict[str, Any]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient("sqlite:///tracked.db")
    parent = client.get_run(results["mlflow_run_id"])
    assert parent.data.tags["raysl.kind"] == "pipeline"
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"pipeline.json"}
    for row in results["steps"]:
        run = client.get_run(row["mlflow_run_id"])
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["step"] == row["step"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_fine_tuning_is_the_same_to_the_bit(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = finetune(capsys, base, "train.steps=3", "name=alone")
    on_ray = finetune(capsys, base, "train.steps=3", "name=ray", "cluster.num_train_workers=1")
    assert on_ray["top1"] == alone["top1"]
    expected = weights(Path(alone["run_dir"]))
    for name, value in weights(Path(on_ray["run_dir"])).items():
        assert torch.equal(value, expected[name]), name
