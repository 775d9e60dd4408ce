"""`raysl benchmark scale`: a point for each scaling and number of workers, side by side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest

from raysl.benchmark.scale_command import STRONG, WEAK, request_for, summarise
from raysl.benchmark.step import LOOP, RUN, StepCost, StepRequest
from raysl.cli import main
from raysl.errors import ConfigError
from raysl.run.recipe import RunConfig, load_run

RunYaml = Callable[[str], Path]


@pytest.fixture
def config(run_yaml: RunYaml) -> RunConfig[Any]:
    return load_run(run_yaml("small"))


@pytest.mark.parametrize(("scaling", "batch"), [(STRONG, 32), (WEAK, 64)])
def test_a_batch_is_divided_or_given_to_each_worker(
    config: RunConfig[Any], scaling: str, batch: int
) -> None:
    request = request_for(config, 2, scaling, steps=1, form=RUN)
    assert request.config["train"]["global_batch_size"] == batch
    assert request.config["cluster"]["num_train_workers"] == request.num_workers == 2
    assert request.form == RUN


def test_a_batch_that_cannot_be_divided_is_refused(config: RunConfig[Any]) -> None:
    with pytest.raises(ConfigError, match="global_batch_size=32 cannot be divided by 3"):
        request_for(config, 3, STRONG, steps=1, form=RUN)


def test_efficiency_is_against_the_fewest_workers_of_the_same_round() -> None:
    batches = {(STRONG, 1): 64, (STRONG, 4): 64, (WEAK, 1): 64, (WEAK, 4): 256}
    rounds = [
        {
            (STRONG, 1): StepCost(80.0 * slow, 1),
            (STRONG, 4): StepCost(25.0 * slow, 1, 0.1),
            (WEAK, 1): StepCost(80.0 * slow, 1),
            (WEAK, 4): StepCost(100.0 * slow, 1, 0.2),
        }
        for slow in (1.0, 2.0, 1.5)
    ]
    points = {(p["scaling"], p["num_workers"]): p for p in summarise(rounds, batches)}
    assert points[STRONG, 1]["efficiency"] == points[WEAK, 1]["efficiency"] == 1
    assert points[STRONG, 4]["efficiency"] == pytest.approx(0.8)  # 3.2 times as fast
    assert points[WEAK, 4]["efficiency"] == pytest.approx(0.8)
    assert points[WEAK, 4]["images_per_s"] == pytest.approx(256 / 0.15)
    assert points[WEAK, 4]["wait_share"] == 0.2
    assert points[WEAK, 1]["wait_share"] is None


def test_prints_and_draws_each_number_of_workers(
    run_yaml: RunYaml,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int, int]] = []

    def measured(request: StepRequest) -> StepCost:
        batch = request.config["train"]["global_batch_size"]
        asked.append((request.form, request.num_workers, batch))
        assert request.threads == 1
        return StepCost(batch / request.num_workers, 1 << 20)

    monkeypatch.setattr("raysl.benchmark.scale_command.measure_in_own_processes", measured)
    figure = tmp_path / "scale.png"
    command = ["benchmark", "scale", str(run_yaml("small")), "--workers=2,1", "--repeats=1"]
    assert main([*command, "--without-ray", f"--figure={figure}", "--json"]) == 0
    out, err = capsys.readouterr()
    points = json.loads(out.splitlines()[-1])["points"]
    assert asked == [(LOOP, 1, 32), (LOOP, 2, 32), (LOOP, 1, 32), (LOOP, 2, 64)]
    assert [p["efficiency"] for p in points] == [1, 1, 1, 1]
    assert "measuring 2 train worker(s), weak scaling, repeat 1 of 1" in err
    assert cv2.imread(str(figure)).shape[1] == 1320
