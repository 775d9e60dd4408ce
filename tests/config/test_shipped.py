"""Configurations that come with raysl are found by their names, in a checkout and in a wheel."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from raysl.cli import main
from raysl.config.load import read_mapping
from raysl.config.shipped import find_config, near_names, shipped_configs
from raysl.downstream.pipeline import load_pipeline
from raysl.errors import ConfigError
from raysl.run.recipe import load_run
from raysl.sweep.load import load_sweep

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_file_has_the_name_of_its_place() -> None:
    shipped = shipped_configs()
    assert sorted(shipped.values()) == sorted(CONFIGS.rglob("*.yaml"))
    assert shipped["quickstart"] == CONFIGS / "quickstart.yaml"
    assert shipped["ten_minutes/simclr"] == CONFIGS / "ten_minutes" / "simclr.yaml"


def test_a_run_a_sweep_and_a_pipeline_by_their_names() -> None:
    assert load_run(Path("ten_minutes/simclr")).name == "simclr"
    assert load_run(Path("quickstart.yaml"), ["seed=3"]).seed == 3
    for name in ("simclr_temperature_batch", "sweeps/simclr_temperature_batch"):
        sweep = load_sweep(Path(name))
        assert sweep.name == "simclr_temperature_batch"
        assert os.path.samefile(sweep.base[0], CONFIGS / "ten_minutes" / "simclr.yaml")
    pipeline = load_pipeline(Path("simclr_v2_cifar10"))
    assert os.path.samefile(pipeline.base, CONFIGS / "ten_minutes" / "simclr_v2.yaml")


def test_a_file_that_exists_wins_and_a_folder_is_none() -> None:
    Path("quickstart").mkdir()
    assert find_config(Path("quickstart")) == CONFIGS / "quickstart.yaml"
    Path("quickstart").rmdir()
    Path("quickstart").write_text("seed: 1")
    assert find_config(Path("quickstart")) == Path("quickstart")


def test_files_of_ones_own_may_extend_and_sweep_shipped_ones() -> None:
    Path("mine.yaml").write_text("extends: quickstart\ntrain: {epochs: 1}\n")
    values = read_mapping(Path("mine.yaml"))
    assert values["train"]["epochs"] == 1
    assert values["data"]["source"] == "digits"
    Path("sweep.yaml").write_text(
        "base: quickstart\nspace: {method.temperature: {grid: [0.1, 0.5]}}\nsearch: {name: grid}\n"
    )
    assert os.path.samefile(load_sweep(Path("sweep.yaml")).base[0], CONFIGS / "quickstart.yaml")


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("quikstart", ["quickstart"]),
        ("ten_minutes/simclrr", ["ten_minutes/simclr"]),
        ("configs/quickstart.yaml", ["quickstart"]),
        ("simclr_temperatur_batch", ["sweeps/simclr_temperature_batch"]),
        ("qqqqqqqqqq", []),
    ],
)
def test_a_wrong_name_has_near_ones(given: str, near: list[str]) -> None:
    assert near_names(Path(given))[: max(1, len(near))] == near
    with pytest.raises(ConfigError) as error:
        load_run(Path(given))
    assert str(error.value).startswith(f"{given}: no such file; ")
    assert (near[0] if near else "raysl config --list") in str(error.value)


def test_the_list_has_all_of_them_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--list"]) == 0
    out = capsys.readouterr().out
    for name, path in shipped_configs().items():
        (shown,) = (line for line in out.splitlines() if line.startswith(f"  {name} "))
        header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines())
        assert header.startswith(shown.split(maxsplit=1)[1]), name
    assert re.search(r"  quickstart +SimCLR on scikit-learn's handwritten digits\n", out)
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert [title.split()[1] for title in titles[:4]] == [
        "pretrain",
        "pretrain",
        "sweep",
        "pipeline",
    ]


def test_the_build_puts_them_into_the_package() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"] == {"configs": "raysl/shipped_configs"}


@pytest.mark.slow
def test_a_wheel_finds_them_without_the_repository(tmp_path: Path) -> None:
    """Built without a network where uv has the backend in its cache; skipped where it has not."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    source = tmp_path / "source"
    for name in ("raysl", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [uv, "build", "--wheel", "--offline", "--out-dir", str(tmp_path / "dist"), str(source)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "hatchling" in built.stderr:
        pytest.skip(f"the build backend is not at hand: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "raysl", "config", "ten_minutes/simclr", "--json"]
    command += ["data={source: digits, limit: null}", "train.global_batch_size=64"]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"name": "simclr"' in done.stdout
