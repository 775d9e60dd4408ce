"""Every sweep in the repository is sound, and tries what its first lines say."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from raysl.config.load import read_mapping, validate
from raysl.config.yaml_text import to_yaml
from raysl.methods import pretraining_method_names
from raysl.run.recipe import RunConfig
from raysl.sweep.check import check
from raysl.sweep.config import SweepConfig
from raysl.sweep.load import load_sweep
from raysl.sweep.space import Candidate, draw

FOLDER = Path(__file__).parents[2] / "configs" / "sweeps"
# Its runs are sound once a run can be fine-tuned.
SWEEPS = sorted(FOLDER.glob("*.yaml"))
every_sweep = pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)


# Loading a sweep checks runs all over its space, which takes seconds.
@cache
def sweep_of(name: str) -> SweepConfig:
    return load_sweep(FOLDER / f"{name}.yaml")


@cache
def candidates_of(name: str) -> tuple[Candidate, ...]:
    return tuple(draw(sweep_of(name)))


@cache
def runs_of(name: str) -> tuple[RunConfig[Any], ...]:
    return tuple(check(sweep_of(name), candidates_of(name), folder=FOLDER))


@every_sweep
def test_loads_and_comes_back_the_same_from_its_own_dump(path: Path, tmp_path: Path) -> None:
    sweep = sweep_of(path.stem)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(to_yaml(sweep.model_dump(mode="json")))
    assert load_sweep(dumped) == sweep
    assert sweep.name == path.stem


@every_sweep
def test_all_its_trials_are_runs(path: Path) -> None:
    assert len(runs_of(path.stem)) == len(candidates_of(path.stem))


@every_sweep
def test_opens_with_its_source_its_command_and_what_was_measured(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert f"# Run:      raysl sweep configs/sweeps/{path.name}" in head
    assert any(line.startswith("# Measured: ") for line in head)
    assert "arXiv:" in " ".join(head) or any(line.startswith("# Sources:") for line in head)


@every_sweep
def test_a_trial_that_is_interrupted_goes_on_from_its_last_epoch(path: Path) -> None:
    assert sweep_of(path.stem).set["train.checkpoint_every"] == {"epochs": 1}


def test_the_pairs_are_all_ordered_ones_of_seven_augmentations() -> None:
    pairs = [tuple(candidate.params.values()) for candidate in candidates_of("augmentation_pairs")]
    assert len(pairs) == len(set(pairs)) == 49
    assert len({first for first, _ in pairs}) == 7
    assert sum(first == second for first, second in pairs) == 7


def test_the_comparison_has_every_method_with_three_seeds() -> None:
    runs = runs_of("method_comparison")
    assert {run.method.name for run in runs} == set(pretraining_method_names())
    assert {run.seed for run in runs} == {0, 1, 2}
    assert len({run.train.epochs for run in runs}) == 1


def test_moco_s_has_each_temperature_batch_and_queue_once_for_asha() -> None:
    name = "moco_temperature_queue_momentum"
    varied = ("method.temperature", "train.global_batch_size", "method.queue_length")
    found = [tuple(each.params[key] for key in varied) for each in candidates_of(name)]
    assert len(found) == len(set(found)) == 27
    assert len({each.params["method.ema_momentum"] for each in candidates_of(name)}) > 2
    assert sweep_of(name).scheduler.name == "asha"


def test_the_one_without_labels_is_decided_by_none() -> None:
    sweep = sweep_of("label_free")
    assert sweep.metric.name == "eval/rankme"  # of the same images in every trial


def test_the_layer_that_is_fine_tuned_from_never_lies_beyond_the_head() -> None:
    path = FOLDER / "head_depth_label_fraction.yaml"
    values = read_mapping(path)
    base = str(FOLDER / values["base"])
    sweep = validate(SweepConfig, values | {"name": path.stem, "base": base}, where=str(path))
    found = [tuple(candidate.params.values()) for candidate in draw(sweep)]
    assert len(found) == len(set(found)) == 27
    assert {(depth, layer) for depth, layer, _ in found} == {
        (depth, layer) for depth in (1, 2, 3) for layer in range(depth + 1)
    }
    assert {fraction for *_, fraction in found} == {0.01, 0.1, 1.0}
