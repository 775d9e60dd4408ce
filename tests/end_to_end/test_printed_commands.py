"""What is printed for a person to type next, typed as it stands."""

import shlex
from pathlib import Path

import click
import cv2
import mlflow.cli
import numpy as np
import pytest
import torch

from raysl.cli import main
from raysl.config.load import read_mapping
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.run.shell import command

TINY = """\
data: {source: MISSING, views: {recipe: simclr, size_px: 16, blur_prob: 0.0}}
backbone: {name: resnet18, stem: small, width: 0.125}
method: {name: simclr}
optim: {name: adamw, base_lr: 1.0e-3}
train: {epochs: 1, global_batch_size: 8, log_every: 1}
evaluate: {every: null, final: [knn]}
cluster: {num_train_workers: 0, device: cpu, threads_per_train_worker: 1, num_data_workers: 1}
track: {mlflow: false}
"""
HERE = ["num_workers=0"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    """A folder with a tiny run and images, whose names a shell would take apart."""
    monkeypatch.chdir(tmp_path)
    Path("my run.yaml").write_text(TINY)
    rng = np.random.default_rng(0)
    for name in ("my photos", "others"):
        for number in range(20):
            path = Path(name) / f"class{number % 2}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))


def printed(capsys: pytest.CaptureFixture[str], title: str) -> list[str]:
    """Return the commands after a title of standard output, as a shell splits them."""
    lines = capsys.readouterr().out.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(f"{title:10}"))
    found = [lines[first][10:]]
    found += [line[10:] for line in lines[first + 1 : first + 2] if line.startswith(" " * 10)]
    return found


def typed(line: str, *more: str) -> int:
    words = shlex.split(line)
    assert words[0] == "raysl"
    return main([*words[1:], *more])


def test_a_longer_run_keeps_all_that_the_first_was_asked_for_with(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["data.source=my photos", "method={name: simclr, temperature: 0.3}", "name=r"]
    assert main(["pretrain", "my run.yaml", "train.epochs=2", *given]) == 0
    (line,) = printed(capsys, "next")
    assert typed(line) == 0
    first, longer = (read_mapping(Path("runs") / n / "config.yaml") for n in ("r", "r-4epochs"))
    assert longer.pop("name") == "r-4epochs"
    assert first.pop("name") == "r"
    assert (first["train"].pop("epochs"), longer["train"].pop("epochs")) == (2, 4)
    assert longer == first
    (again,) = printed(capsys, "next")  # not the name that there is by now
    assert shlex.split(again)[-2:] == ["name=r-8epochs", "train.epochs=8"]


def test_a_length_in_steps_is_doubled_in_steps(capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["train.epochs=null", "train.steps=1", "data.source=others"]
    assert main(["pretrain", "my run.yaml", *steps, "name=r"]) == 0
    (line,) = printed(capsys, "next")
    assert typed(line) == 0
    assert read_mapping(Path("runs/r-2steps/config.yaml"))["train"]["steps"] == 2


def test_after_fine_tuning_and_distilling_comes_a_student(
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = ["name=r", "output_dir=my runs"]
    assert main(["pretrain", "my run.yaml", "data.source=my photos", *named]) == 0
    capsys.readouterr()
    assert main(["finetune", "my runs/r", "train.steps=1"]) == 0
    for name in ("r-finetuned-distilled", "r-finetuned-distilled-distilled"):
        (line,) = printed(capsys, "next")
        assert typed(line, "train.steps=1") == 0  # 400 epochs as it stands
        assert (Path("my runs") / name / "classifier.safetensors").exists()


def test_fine_tuning_a_pretraining_is_answered_with_the_command_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["finetune", "my run.yaml", "data.source=my photos", "name=r"]) == 1
    line = capsys.readouterr().err.strip().partition(", or ")[2]
    assert typed(line) == 0
    assert Path("runs/r/encoder.safetensors").exists()


def test_built_in_images_have_a_line_for_ones_own_and_next_needs_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("simclr_resnet18_photos.yaml").write_text(TINY)
    digits = ["data.source=digits", "data.limit=16", "train.global_batch_size=8", "name=r"]
    assert main(["pretrain", "my run.yaml", *digits]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("photos"))[10:]
    assert typed(line.replace("FOLDER_OF_IMAGES", "'my photos'")) == 0
    assert read_mapping(Path("runs/mine/config.yaml"))["data"]["source"].endswith("/my photos")


def test_embedding_leads_to_searching_and_to_dropping_duplicates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pretrain", "my run.yaml", "data.source=my photos", "name=r"]) == 0
    copy = Path("my photos/class0/copy.png")
    copy.write_bytes(Path("my photos/class0/00.png").read_bytes())
    capsys.readouterr()
    assert main(["embed", "my photos", "runs/r", "my embeddings", *HERE]) == 0
    lines = printed(capsys, "next")
    assert len(lines) == 2
    assert [typed(line) for line in lines] == [0, 0]
    assert Path("neighbours.png").exists()
    assert Path("duplicates.png").exists()
    said = capsys.readouterr().err
    override = next(li for li in said.splitlines() if li.startswith("to leave them out: "))
    override = shlex.split(override.removeprefix("to leave them out: "))[0]
    assert main(["pretrain", "my run.yaml", "data.source=my photos", override, "name=less"]) == 0
    assert "copy.png" in Path("my embeddings/_drop.txt").read_text()


def test_packing_leads_to_a_look_and_to_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "my photos", "my shards", *HERE]) == 0
    lines = printed(capsys, "next")
    assert typed(lines[0]) == 0
    assert main(["pack", "my photos", "my shards", *HERE]) == 0
    (then,) = printed(capsys, "then")
    assert typed(then.replace("CONFIG", "'my run.yaml'")) == 0
    assert Path("runs/packed/encoder.safetensors").exists()


def test_words_are_quoted_as_a_shell_needs_it() -> None:
    words = ["a b", "x={y: [1, 2]}", "it's", Path("plain/path")]
    line = command("benchmark input", *words)
    assert shlex.split(line) == ["raysl", "benchmark", "input", *map(str, words)]
    assert line.endswith(" plain/path")


def test_importing_leads_to_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    small = BackboneConfig(name="resnet18", stem="small", width=0.125)
    torch.save({"state_dict": build_backbone(small, image_size_px=32).state_dict()}, "theirs.pth")
    assert main(["import", "theirs.pth", "-o", "my encoder.safetensors"]) == 0
    (line,) = printed(capsys, "next")
    here = ["cluster.num_train_workers=0", "track.mlflow=false"]  # no Ray of its own
    assert typed(line, *here, "--protocols", "knn") == 0
    assert "knn" in capsys.readouterr().out


@pytest.mark.usefixtures("empty_store_here")
def test_the_compare_line_opens_mlflow_on_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The line is read as MLflow reads it; its server would take ten seconds to start."""
    asked = ["data.source=my photos", "name=r", "track={mlflow: true, log_model: false}"]
    assert main(["pretrain", "my run.yaml", *asked]) == 0
    (line,) = printed(capsys, "compare")
    program, verb, *options = shlex.split(line)
    assert program == "mlflow"
    command_of_mlflow = mlflow.cli.cli.get_command(click.Context(mlflow.cli.cli), verb)
    assert command_of_mlflow is not None
    given = command_of_mlflow.make_context(verb, options).params  # raises for a wrong option
    client = mlflow.MlflowClient(given["backend_store_uri"])
    (experiment,) = client.search_experiments(filter_string="name = 'raysl'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "r"
