"""`raysl.pretrain`, the Python door."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import raysl
from raysl.cli import main
from raysl.errors import ConfigError
from raysl.track.run_folder import RunFolder, read_metrics

pytestmark = pytest.mark.usefixtures("undrawn")

SHORT = ["train.steps=2", "evaluate.final=[knn]", "evaluate.every=null"]


def losses(name: str) -> list[float]:
    records = read_metrics(RunFolder(Path("runs") / name).metrics)
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_a_file_gives_what_the_command_prints(
    run_yaml: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_yaml("typed")
    results = raysl.pretrain(path, SHORT)
    assert results["run_dir"] == str(Path("runs/typed").resolve())
    assert main(["pretrain", str(path), *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results


def test_a_mapping_trains_as_its_file_does(run_yaml: Callable[[str], Path]) -> None:
    path = run_yaml("typed")
    raysl.pretrain(str(path), SHORT)
    settings = yaml.safe_load(path.read_text()) | {"name": "given"}
    raysl.pretrain(settings, SHORT)
    assert losses("given") == losses("typed") != []


def test_a_mapping_may_extend_a_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "raysl.run.from_python.train_run", lambda config, **more: asked.append(config) or {}
    )
    raysl.pretrain({"extends": "quickstart", "name": "mine", "seed": 5}, "train.epochs=1")
    raysl.pretrain("quickstart", ["seed=6"])
    raysl.pretrain("quickstart", {"seed": 6})
    raysl.pretrain("quickstart", {"data.source": tmp_path, "optim.warmup": {"steps": 2}})
    first, second, third, fourth = asked
    assert (first.name, first.seed, first.train.epochs) == ("mine", 5, 1)
    assert (second.name, second.seed, second.train.epochs) == ("quickstart", 6, 12)
    assert first.data == second.data
    assert third == second
    assert (fourth.data.source, fourth.optim.warmup.steps) == (str(tmp_path), 2)
    assert fourth.optim.base_lr == second.optim.base_lr


def test_errors_are_raysl_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        raysl.pretrain("quickstar")
    with pytest.raises(ConfigError, match="did you mean 'base_lr'"):
        raysl.pretrain("quickstart", ["optim.base_lrr=1"])
    with pytest.raises(ConfigError, match="name: missing"):
        raysl.pretrain({"extends": "quickstart"})


def test_importing_raysl_loads_neither_torch_nor_ray() -> None:
    code = "import sys, raysl; assert not {'torch', 'ray', 'mlflow', 'yaml'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
