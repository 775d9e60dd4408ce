"""Every configuration in the repository is a run, and stays one when it is written and read."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from raysl.config.yaml_text import to_yaml
from raysl.methods import pretraining_method_names
from raysl.run.recipe import RunConfig, load_run

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted([*FOLDER.glob("*.yaml"), *(FOLDER / "ten_minutes").glob("*.yaml")])


@cache
def run_of(path: Path) -> RunConfig[Any]:
    return load_run(path)


def test_there_is_one_for_every_method() -> None:
    methods = {run_of(path).method.name for path in CONFIGS}
    assert methods - {"supervised"} == set(pretraining_method_names())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_loads_and_comes_back_the_same_from_its_own_dump(path: Path, tmp_path: Path) -> None:
    config = run_of(path)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(to_yaml(config.model_dump(mode="json")))
    assert load_run(dumped) == config
    assert config.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_opens_with_its_source_its_command_and_what_was_measured(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    assert head.startswith("# ")
    assert "# Run: " in head
    assert "# Measured: " in head
