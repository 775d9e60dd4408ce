"""Every pipeline in the repository is sound, and does what its first lines say."""

from pathlib import Path

import numpy as np
import pytest

from raysl.config.load import to_yaml
from raysl.jobs.pipeline import Runs, load_pipeline, plan_steps
from raysl.sources.source import ArraySource

FOLDER = Path(__file__).parents[2] / "configs" / "pipelines"
every_pipeline = pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem
)


@every_pipeline
def test_loads_and_comes_back_the_same_from_its_own_dump(path: Path, tmp_path: Path) -> None:
    config = load_pipeline(path)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(to_yaml(config.model_dump(mode="json")))
    assert load_pipeline(dumped) == config
    assert config.name == path.stem


@every_pipeline
def test_all_its_steps_are_runs(path: Path, tmp_path: Path) -> None:
    config = load_pipeline(path)
    labels = np.arange(12_000) % 10
    whole = ArraySource("images", np.zeros((12_000, 1, 1), np.uint8), labels, list("abcdefghij"))
    steps, runs = plan_steps(config), Runs(config, tmp_path)
    kinds = []
    for step in steps:
        run = runs.config(step, next(iter(step.teachers), None), whole=whole)
        kinds.append(run.method.name)
    assert kinds[0] == "simclr"
    assert {"supervised", "distill"} == set(kinds[1:])
    assert {step.head_layers for step in steps if step.kind == "finetune"} == {0, 1, 2}


@every_pipeline
def test_opens_with_its_source_its_command_and_what_was_measured(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert any(line.startswith("# Run: ") for line in head)
    assert any(line.startswith("# Measured: ") for line in head)
    assert f"configs/pipelines/{path.name}" in " ".join(head)
    assert "arXiv:2006.10029v2" in " ".join(head)
