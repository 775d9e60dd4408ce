"""`raysl export` as a command: formats, places, MLflow's registry, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main
from raysl.encoder.file import load_encoder
from raysl.track import mlflow_model

Results = Callable[..., dict[str, Any]]


@pytest.fixture
def encoder(tiny_encoder: Callable[..., Path]) -> Path:
    """A ResNet of a width that no library has: programs can hold it, timm cannot."""
    return tiny_encoder("run")


def test_writes_below_the_run_checks_and_prints_how_to_load(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(encoder.parent), "--format", "torchscript", "--json"]) == 0
    printed, said = capsys.readouterr()
    results = json.loads(printed.splitlines()[-1])
    assert results["encoder"] == str(encoder)
    assert results["failed"] == []
    export = results["exports"]["torchscript"]
    path = encoder.parent / "exports" / "encoder.torchscript.pt"
    assert export["path"] == str(path)
    assert export["bytes"] == path.stat().st_size
    assert export["difference"] < 1e-5
    assert export["seconds"] > 0
    assert f'    model = torch.jit.load("{path}")\n' in printed
    assert "torchscript: writing and verifying" in said


def test_of_several_formats_one_that_fails_does_not_keep_the_others_from_being_written(
    encoder: Path, tmp_path: Path, results_of: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--format", "torchscript,timm", "--format", "torchscript", "-o", tmp_path / "team"]
    results = results_of("export", encoder, *words, status=1)
    assert list(results["exports"]) == ["torchscript"]
    assert (tmp_path / "team" / "encoder.torchscript.pt").exists()
    (failed,) = results["failed"]
    assert "neither torchvision nor timm has" in failed
    assert main(["export", str(encoder), "--format", "timm"]) == 1
    assert "neither torchvision nor timm has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--format", "tensorrt"], "--format tensorrt: known are torchvision, timm, onnx"),
        (["--format", "onxx"], "did you mean 'onnx'?"),
        (["--format", ","], "--format : known are "),
        (["--format", "mlflow"], "--format mlflow and --name NAME_IN_THE_REGISTRY go together"),
        (["--format", "onnx", "--name", "x"], "--format mlflow and --name NAME_IN_THE_"),
        (["--format", "onnx", "-o", "out.pt"], "a file of --format onnx ends with .onnx"),
        (["--format", "onnx", "opset=9"], "opset: Input should be greater than or equal to 18"),
        (["--format", "onnx,timm", "-o", "FILE"], "is a file; give a folder"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(
    encoder: Path,
    tmp_path: Path,
    words: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["export", str(encoder), *[str(file) if w == "FILE" else w for w in words]]) == 1
    assert text in capsys.readouterr().err
    assert not (encoder.parent / "exports").exists()
    assert file.read_bytes() == b""


def test_what_is_no_encoder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing"), "--format", "onnx"]) == 1
    assert "nothing" in capsys.readouterr().err


class TestMlflow:
    @pytest.fixture
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """Replace MLflow's registry: record the arguments and check the model as it does."""
        calls: list[dict[str, Any]] = []

        def register(model: Any, *, check: Any, **given: Any) -> mlflow_model.Registered:
            calls.append(given)
            difference = check(load_encoder(given["name"]) if "/" in given["name"] else model)
            return mlflow_model.Registered(given["name"], "3", "abc", difference)

        monkeypatch.setattr(mlflow_model, "register_encoder", register)
        return calls

    def test_a_version_is_registered_and_the_lines_that_load_it_are_printed(
        self,
        encoder: Path,
        registered: list[dict[str, Any]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        uri = "https://me:secret@mlflow.example"
        words = ["--format", "mlflow", "--name", "photos", f"tracking_uri={uri}", "--json"]
        assert main(["export", str(encoder), *words]) == 0
        printed, _ = capsys.readouterr()
        assert "secret" not in printed
        assert "mlflow: version 3 of photos" in printed
        assert '    model = mlflow.pytorch.load_model("models:/photos/3")' in printed
        result = json.loads(printed.splitlines()[-1])["exports"]["mlflow"]
        assert (result["name"], result["version"], result["difference"]) == ("photos", "3", 0.0)
        (given,) = registered
        assert (given["uri"], given["run_id"], given["experiment"]) == (uri, None, "raysl")
        assert (given["size_px"], given["embed_dim"]) == (16, 64)

    def test_a_stored_model_that_differs_is_an_error(
        self,
        encoder: Path,
        tiny_encoder: Callable[..., Path],
        registered: list[dict[str, Any]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        other = tiny_encoder("other", seed=1)
        words = ["--format", "mlflow", "--name", str(other), "tracking_uri=sqlite:///x.db"]
        assert main(["export", str(encoder), *words]) == 1
        assert "the stored model differs by" in capsys.readouterr().err
        assert len(registered) == 1
