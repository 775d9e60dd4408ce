"""What a run without Ray measures on its way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.evaluate.online import LABEL_FREE
from raysl.run.local import pretrain_here
from raysl.run.recipe import RunConfig, load_run
from raysl.sources.open import open_source
from raysl.track.run_folder import RunFolder, read_metrics, waiting_path

SHORT = ["train.steps=3"]


def trained(config: RunConfig[Any], folder: RunFolder) -> dict[str, Any]:
    folder.path.mkdir(exist_ok=True)
    source = open_source(config.data, data=config.data)
    return pretrain_here(config, folder=folder, source=source, num_cpus=1)


def evaluations(folder: RunFolder) -> dict[int, dict[str, float]]:
    return {
        record["step"]: {key: value for key, value in record.items() if key.startswith("eval/")}
        for record in read_metrics(folder.metrics)
        if any(key.startswith("eval/") for key in record)
    }


def test_images_without_labels_get_the_measures_that_need_none(
    run_yaml: Callable[[str], Path], draw_images: Callable[..., Path], tmp_path: Path
) -> None:
    photos = draw_images(tmp_path / "photos", range(40), size=(32, 32))
    given = [f"data.source={photos}", "data.limit=null", "train.steps=3", "evaluate.every.steps=2"]
    folder = RunFolder(tmp_path / "run")
    results = trained(load_run(run_yaml("a"), given), folder)
    found = evaluations(folder)
    assert set(found) == {2, 3}
    assert all(set(f) == {f"eval/{name}" for name in LABEL_FREE} for f in found.values())
    assert 1 < found[3]["eval/rankme"] <= 40
    assert found[2] != found[3]
    assert not {key for key in results if "top1" in key}


def test_what_a_start_on_ray_left_to_measure_is_measured_as_if_the_workers_had(
    run_yaml: Callable[[str], Path], tmp_path: Path
) -> None:
    config = load_run(run_yaml("a"), [*SHORT, "evaluate.every.steps=3", "data.limit=64"])
    folder = RunFolder(tmp_path / "run")
    first = trained(config, folder)
    assert set(evaluations(folder)) == {3}
    left = waiting_path(folder.to_evaluate, 2)  # with the weights of step 3
    left.parent.mkdir()
    folder.encoder.rename(left)
    assert trained(config, folder) == first
    found = evaluations(folder)
    assert found == {2: found[3], 3: found[3]}
    assert not folder.to_evaluate.exists()
    steps = [r["step"] for r in read_metrics(folder.metrics) if "eval/knn_top1" in r]
    assert steps == [3, 2]


@pytest.mark.parametrize("every", ["{steps: 2}", "null"])
def test_the_result_of_the_last_step_is_its_evaluation(
    every: str, run_yaml: Callable[[str], Path], tmp_path: Path
) -> None:
    config = load_run(run_yaml("a"), [*SHORT, f"evaluate.every={every}", "data.limit=64"])
    folder = RunFolder(tmp_path / "run")
    results = trained(config, folder)
    found = evaluations(folder)
    assert set(found) == ({2, 3} if every != "null" else set())
    if found:
        assert found[3]["eval/knn_top1"] == results["knn_top1"]
