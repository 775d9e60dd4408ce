"""Fine-tuning, distillation and whole pipelines as a person runs them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from torch import Tensor

import raysl
from raysl.cli import main
from raysl.config.load import read_mapping
from raysl.evaluate.features import square
from raysl.nn.classifier import Classifier
from raysl.sources.builtin import open_digits
from raysl.sources.source import spread_rows
from raysl.track.run_folder import RunFolder, list_checkpoints, read_metrics

SMALL = ["backbone={name: resnet18, stem: small, width: 0.25}", "method.projection_layers=3"]
SHORT = ["train.steps=2", "evaluate.every=null"]
FAST = "optim={name: adamw, base_lr: 0.003}"
TUNE = ["data.labels.fraction=0.25", "train.epochs=2", "train.global_batch_size=10", FAST]
EACH_STEP = "train.log_every=1"
NEARLY = 2 / 450  # two images whose best classes are equal but for rounding
ALL_TEST_IMAGES = "evaluate.max_test_images=450"

PIPELINE = """\
base: base.yaml
pretrain:
  backbone.stem: small
  backbone.width: 0.25
  method.projection_layers: 3
  train.steps: 2
  evaluate.final: [knn]
set:
  evaluate.every: null
  train.checkpoint_every: {fraction: 0.5}
  optim: {name: adamw, base_lr: 0.003}
finetune:
  - {labels: [0.25], start: random, set: {train.epochs: 1, train.global_batch_size: 20}}
  - {labels: [0.25], head_layers: [0, 1], set: {train.epochs: 1, train.global_batch_size: 20}}
distill:
  - {name: same, set: {train.epochs: null, train.steps: 2, train.global_batch_size: 40}}
  - name: smaller
    teacher: same
    set: {backbone.width: 0.125, train.epochs: null, train.steps: 2, train.global_batch_size: 40}
"""
STEPS = [
    "pretrain",
    "scratch-25percent",
    "finetune-25percent-layer0",
    "finetune-25percent-layer1",
    "distill-25percent-same",
    "distill-25percent-smaller",
]

Do = Callable[..., dict[str, Any]]


@pytest.fixture
def do(capsys: pytest.CaptureFixture[str]) -> Do:
    """Run a verb; return the results that it prints."""

    def run(*words: str) -> dict[str, Any]:
        assert main([*words, "--json"]) == 0, capsys.readouterr().err[-3000:]
        results: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return results

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, run_text: str) -> Path:
    """A folder in which a small encoder was pretrained for two steps, for all tests to copy."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "pre.yaml").write_text(run_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("raysl.run.page.draw_all", lambda *_, **__: [])
        assert main(["pretrain", "pre.yaml", *SMALL, *SHORT]) == 0
    return folder


@pytest.fixture
def pretrained(finished: Path, run_yaml: Callable[[str], Path]) -> Path:
    """Return the folder of the small encoder's run, this test's own."""
    run_yaml("pre")
    shutil.copytree(finished / "runs", "runs")
    return Path("runs/pre")


def accuracy(model: Classifier) -> float:
    """Classify every test image of the digits as the file says that they are to be shown."""
    source = open_digits("test")
    size = model.description["image_size_px"]
    colored = [np.stack([grey] * 3, axis=-1) for grey in source.images]
    images = [square(image, size_px=size, crop_fraction=1.0) for image in colored]
    mean, std = (torch.tensor(model.description[name]) for name in ("mean", "std"))
    pixels = (torch.from_numpy(np.stack(images)) / 255 - mean) / std
    with torch.inference_mode():
        predicted = model(pixels.permute(0, 3, 1, 2)).argmax(dim=1)
    return float((predicted.numpy() == source.labels()).mean())


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


class TestFinetuneThenDistill:
    def test_what_they_report_is_what_their_files_do(self, pretrained: Path, do: Do) -> None:
        tuned = do("finetune", str(pretrained), *TUNE, ALL_TEST_IMAGES)
        folder = RunFolder(Path(tuned["run_dir"]))
        assert folder.path == Path("runs/pre-finetuned-25percent-layer1").absolute()
        seen = json.loads(folder.labels.read_text())
        labels = raysl_labels(seen["rows"])
        assert tuned["num_labels"] == len(set(seen["rows"])) == 40  # a quarter of 160 images
        assert np.bincount(labels, minlength=10).tolist() == [4] * 10
        assert (seen["source"], seen["fraction"], seen["seed"]) == ("digits/train", 0.25, 0)
        assert (tuned["steps"], tuned["num_test_labels"], tuned["num_classes"]) == (8, 450, 10)
        teacher = raysl.load_classifier(folder.path)
        assert [len(teacher.head), teacher.class_names[3]] == [3, "3"]  # Linear, BN, ReLU
        assert accuracy(teacher) == pytest.approx(tuned["top1"], abs=NEARLY)
        assert read_metrics(folder.metrics)[-1]["final/top1"] == tuned["top1"]

        more = ["backbone.width=0.125", "train.steps=3", "train.epochs=null"]
        more += ["train.global_batch_size=40", EACH_STEP, FAST, ALL_TEST_IMAGES]
        student = do("distill", str(folder.path), *more)
        assert Path(student["run_dir"]).name == f"{folder.path.name}-distilled-resnet18-0.125x"
        model = raysl.load_classifier(student["run_dir"])
        assert accuracy(model) == pytest.approx(student["top1"], abs=NEARLY)
        assert count(model) < count(teacher)
        records = read_metrics(RunFolder(Path(student["run_dir"])).metrics)
        learnt = [r for r in records if "train/loss" in r]
        assert [r["step"] for r in learnt] == [1, 2, 3]
        assert all(r["distill/loss"] >= r["distill/teacher_entropy"] - 1e-5 for r in learnt)
        assert RunFolder(Path(student["run_dir"])).report.exists()
        assert same(teacher.state_dict(), raysl.load_classifier(folder.path).state_dict())

    @pytest.mark.usefixtures("undrawn")
    def test_stopped_and_started_again_ends_with_the_same_weights(
        self,
        pretrained: Path,
        do: Do,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        more = [*TUNE, EACH_STEP, "train.checkpoint_every={steps: 2}", "method.mixup=0.5"]
        whole = do("finetune", str(pretrained), *more, "name=whole")
        parted = ["finetune", str(pretrained), *more, "name=parted"]
        with monkeypatch.context() as patch:
            patch.setattr("raysl.methods.supervised.supervised_loss", stopping_at(6))
            assert main(parted) == 130
        assert "the same command resumes from its last checkpoint" in capsys.readouterr().err
        folders = [RunFolder(Path("runs") / name) for name in ("whole", "parted")]
        assert list_checkpoints(folders[1].checkpoints)[-1] == 4
        assert not folders[1].classifier.exists()
        again = do(*parted)
        assert (again["steps"], again["top1"]) == (whole["steps"], whole["top1"])
        states = [raysl.load_classifier(folder.path).state_dict() for folder in folders]
        assert same(states[0], states[1])
        lines = [
            {r["step"]: r["train/loss"] for r in read_metrics(f.metrics) if "train/loss" in r}
            for f in folders
        ]
        assert lines[0] == lines[1]
        assert len(lines[0]) == 8

    @pytest.mark.usefixtures("undrawn")
    def test_a_frozen_encoder_stays_as_it_was(self, pretrained: Path, do: Do) -> None:
        frozen = ["method.head_layers=0", "method.freeze_encoder=true", "name=linear"]
        results = do("finetune", str(pretrained), *TUNE, *frozen)
        before, after = (
            raysl.load_encoder(path).state_dict() for path in (pretrained, results["run_dir"])
        )
        assert same(before, after)

    @pytest.mark.usefixtures("undrawn")
    def test_a_yaml_file_is_a_whole_run(
        self, pretrained: Path, do: Do, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["finetune", "pre.yaml"]) == 1
        assert "method simclr pretrains; give method supervised" in capsys.readouterr().err
        supervised = ["method={name: supervised}", "train.global_batch_size=10", FAST]
        supervised += ["backbone={name: resnet18, stem: small, width: 0.125}"]
        views = "data.views={recipe: finetune, size_px: 32, flip_prob: 0}"
        results = do("finetune", "pre.yaml", *supervised, views, "train.steps=1", "name=scratch")
        assert results["num_labels"] == 160
        assert not (Path(results["run_dir"]) / "labels.json").exists()  # it sees them all

    def test_what_cannot_be_is_one_line_and_leaves_nothing(
        self, run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_yaml("pre")
        Path("runs").mkdir()
        for words, answer in (
            (["finetune", "runs/nothing"], "neither a finished run nor an encoder file"),
            (["distill", "runs"], "no run with a classifier.safetensors in it"),
        ):
            assert main(words) == 1
            error = capsys.readouterr().err
            assert answer in error
            assert "Traceback" not in error
        assert list(Path("runs").iterdir()) == []


def raysl_labels(rows: list[int]) -> Any:
    """The labels of rows of the 160 images that the configurations here take."""
    labels = open_digits("train").labels()
    assert labels is not None
    return labels[spread_rows(len(labels), 160)[rows]]


def count(model: Classifier) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def stopping_at(call: int) -> Callable[..., Tensor]:
    """Return a loss at whose so-manieth call Ctrl-C is pressed."""
    from raysl.methods.supervised import supervised_loss

    calls: list[int] = []

    def loss(*given: Any, **more: Any) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return supervised_loss(*given, **more)

    return loss


class TestPipeline:
    @pytest.fixture
    def folder(self, run_yaml: Callable[[str], Path], tmp_path: Path) -> Path:
        run_yaml("base")
        (tmp_path / "mine.yaml").write_text(PIPELINE)
        return Path("runs/mine").absolute()

    def test_a_dry_run_checks_and_starts_nothing(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pipeline", "mine.yaml", "--dry-run"]) == 0
        printed = "".join(capsys.readouterr())
        assert all(step in printed for step in STEPS)
        assert main(["pipeline", "mine.yaml", "finetune=[{labels: [0.25], head_layers: [4]}]"]) == 1
        assert "teacher" in capsys.readouterr().err  # whose layer is 1
        deep = ["finetune=[{labels: [0.25], head_layers: [4]}]", "distill=[]"]
        assert main(["pipeline", "mine.yaml", *deep]) == 1
        assert "use at most 3" in capsys.readouterr().err
        assert not folder.exists()

    @pytest.mark.slow
    @pytest.mark.usefixtures("undrawn", "empty_store_here")
    def test_finishes_and_then_repeats_only_what_is_missing(
        self, folder: Path, do: Do, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ("pipeline", "mine.yaml", "track.mlflow=true", "track.log_model=false")
        first = do(*command)
        assert [row["step"] for row in first["steps"]] == STEPS
        assert first["finished"] == len(STEPS)
        for row in first["steps"]:
            results = RunFolder(folder / row["step"]).read_results()
            assert results is not None
            measured = "knn_top1" if row["step"] == "pretrain" else "top1"
            assert row["top1"] == results[measured]
        teachers = {row["step"]: row["teacher"] for row in first["steps"][4:]}
        assert teachers == {STEPS[4]: STEPS[3], STEPS[5]: STEPS[4]}
        labels = {(folder / step / "labels.json").read_text() for step in STEPS[1:4]}
        assert len(labels) == 1  # all see the same images
        page = (folder / "report.html").read_text()
        assert all(f"<code>{step}</code>" in page for step in STEPS)
        assert page.count("<img") == 1
        self.check_mlflow(first)

        before = times(folder)
        assert do(*command) == first
        assert times(folder) == before
        self.check_mlflow(first)

        gone = STEPS[3]
        weights = raysl.load_classifier(folder / gone).state_dict()
        shutil.rmtree(folder / gone)
        again = do(*command)
        assert same(raysl.load_classifier(folder / gone).state_dict(), weights)
        assert [row["top1"] for row in again["steps"]] == [row["top1"] for row in first["steps"]]
        now = times(folder)
        changed = {path.parts[0] for path, time in now.items() if before[path] != time}
        assert changed == {gone}

        capsys.readouterr()
        assert main(["pipeline", "mine.yaml", "pretrain.train.steps=3"]) == 1
        assert "holds a pipeline with another pretrain" in capsys.readouterr().err
        assert times(folder) == now

    def check_mlflow(self, results: dict[str, Any]) -> None:
        """One run of the pipeline and below it one of each step."""
        runs = {run.info.run_id: run for run in runs_in_mlflow()}
        parent = runs.pop(results["mlflow_run_id"])
        assert parent.data.tags["raysl.kind"] == "pipeline"
        assert parent.info.status == "FINISHED"
        assert sorted(run.data.tags["step"] for run in runs.values()) == sorted(STEPS)
        assert set(runs) == {row["mlflow_run_id"] for row in results["steps"]}
        for run in runs.values():
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert run.info.status == "FINISHED"
        client = MlflowClient(STORE)
        files = {file.path for file in client.list_artifacts(parent.info.run_id)}
        assert {"pipeline.yaml", "pipeline.json", "report.html"} <= files


STORE = "sqlite:///mlflow.db"


def runs_in_mlflow() -> list[Run]:
    client = MlflowClient(STORE)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))


def times(folder: Path) -> dict[Path, int]:
    """Return when the files of the steps were written, but for those that a lock leaves."""
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for path in folder.glob("*/**/*")
        if path.is_file() and path.name in KEPT
    }


KEPT = {
    "results.json",
    "metrics.jsonl",
    "encoder.safetensors",
    "classifier.safetensors",
    "state.pt",
}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "undrawn")
def test_two_workers_fine_tune_as_one_does(pretrained: Path, do: Do) -> None:
    few = [*TUNE, "train.epochs=null", "train.steps=2", ALL_TEST_IMAGES]
    here = do("finetune", str(pretrained), *few, "name=here")
    two = ["cluster.num_train_workers=2", "cluster.cpus_per_train_worker=0.5"]
    there = do("finetune", str(pretrained), *few, *two, "name=there")
    accuracies = [{key for key in found if "top1" in key} for found in (here, there)]
    assert accuracies[0] == accuracies[1] == {"top1"}
    assert here.keys() <= there.keys()
    assert (there["num_labels"], there["num_test_labels"]) == (40, 450)
    model = raysl.load_classifier(there["run_dir"])
    assert accuracy(model) == pytest.approx(there["top1"], abs=NEARLY)
    labels = [(Path(found["run_dir"]) / "labels.json").read_text() for found in (here, there)]
    assert labels[0] == labels[1]
    assert read_mapping(Path(there["run_dir"]) / "config.yaml")["cluster"]["num_train_workers"] == 2
