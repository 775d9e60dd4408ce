"""The steps of a pipeline: their order, who teaches, what a second start does.

A stand-in trains nothing; tests/end_to_end/test_downstream_commands.py trains.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.cli import main
from raysl.downstream import pipeline_command
from raysl.errors import DivergedError
from raysl.run.recipe import RunConfig

PIPELINE = """\
base: base.yaml
pretrain: {backbone.stem: small, method.projection_layers: 3, train.steps: 2}
finetune: [{labels: [0.25], head_layers: [0, 1]}]
distill: [{name: student, teacher: best}]
track: {mlflow: false}
"""
STEPS = ["pretrain", "finetune-25percent-layer0", "finetune-25percent-layer1"]
DISTILL = "distill-25percent-student"
# Of each step; the fine-tuning without a layer of the head is the better one.
TOP1 = dict(zip([*STEPS, DISTILL], [None, 0.8, 0.6, 0.7], strict=True))


class Driver:
    """Stands for the driver of runs: notes them, and may raise at a step."""

    def __init__(self) -> None:
        self.configs: dict[str, RunConfig[Any]] = {}
        self.given: list[dict[str, Any]] = []
        self.errors: dict[str, BaseException] = {}

    def __call__(self, config: RunConfig[Any], **given: Any) -> dict[str, Any]:
        self.configs[config.name] = config
        self.given.append(given)
        if config.name in self.errors:
            raise self.errors[config.name]
        folder = Path(config.output_dir) / config.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "encoder.safetensors").touch()  # the steps after it name it
        top1 = TOP1[config.name]
        measured = {"knn_top1": 0.5} if top1 is None else {"top1": top1, "num_labels": 40}
        return {"run_dir": f"runs/mine/{config.name}", "seconds": 1.0} | measured


class Tracker:
    """Stands for MLflow's tracker of the whole pipeline."""

    run_id, trouble = "parent", None

    def __init__(self) -> None:
        self.statuses: list[str] = []

    def finish(self, *, status: str, **_: Any) -> None:
        self.statuses.append(status)


@pytest.fixture(autouse=True)
def _in_its_folder(
    run_yaml: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_yaml("base")
    (tmp_path / "mine.yaml").write_text(PIPELINE)
    monkeypatch.setattr("raysl.downstream.pipeline_page.draw_pipeline", lambda *_, **__: [])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(pipeline_command, "train_run", made)
    return made


def kept() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path("runs/mine/pipeline.json").read_text())
    return values


def test_the_steps_run_in_order_and_the_best_fine_tuning_teaches(
    driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pipeline", "mine.yaml", "--json"]) == 0
    assert list(driver.configs) == [*STEPS, DISTILL]
    student = driver.configs[DISTILL]
    assert Path(student.method.teacher).name == STEPS[1]
    assert {Path(config.output_dir).name for config in driver.configs.values()} == {"mine"}
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results == kept()
    assert results["finished"] == 4
    assert [row["teacher"] for row in results["steps"]] == [None, None, None, STEPS[1]]
    assert [row["top1"] for row in results["steps"]] == [0.5, 0.8, 0.6, 0.7]


def test_notes_of_the_images_are_said_once(driver: Driver) -> None:
    assert main(["pipeline", "mine.yaml"]) == 0
    (fingerprint,) = driver.given[0]["notes_printed"]
    assert all(given["notes_printed"] == {fingerprint} for given in driver.given)


def test_what_is_finished_before_an_error_is_written_down(driver: Driver) -> None:
    driver.errors[STEPS[2]] = DivergedError("nan")
    assert main(["pipeline", "mine.yaml"]) == 1
    assert [row["step"] for row in kept()["steps"]] == STEPS[:2]


@pytest.mark.parametrize(
    ("error", "exit_status", "status"),
    [
        (None, 0, "FINISHED"),
        (DivergedError("nan"), 1, "FAILED"),
        (KeyboardInterrupt(), 130, "KILLED"),
    ],
)
def test_its_mlflow_run_ends_as_the_pipeline_does_and_is_the_steps_parent(
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    exit_status: int,
    status: str,
) -> None:
    tracker = Tracker()
    monkeypatch.setattr(pipeline_command, "start_tracker", lambda *_, **__: tracker)
    if error is not None:
        driver.errors[STEPS[1]] = error
    assert main(["pipeline", "mine.yaml", "track.mlflow=true"]) == exit_status
    assert tracker.statuses == [status]
    assert all(given["tags"]["mlflow.parentRunId"] == "parent" for given in driver.given)
    assert [given["tags"]["step"] for given in driver.given] == list(driver.configs)


class TestTheFolder:
    def test_refuses_another_pretraining_and_takes_more_steps(
        self, driver: Driver, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pipeline", "mine.yaml", "distill=[]"]) == 0
        assert DISTILL not in driver.configs
        assert main(["pipeline", "mine.yaml"]) == 0
        assert DISTILL in driver.configs
        assert main(["pipeline", "mine.yaml", "pretrain.data.if_changed=go_on"]) == 0
        assert main(["pipeline", "mine.yaml", "pretrain.train.steps=3"]) == 1
        error = capsys.readouterr().err
        assert "holds a pipeline with another pretrain" in error
        assert "pretrain.train.steps: 2 -> 3" in error

    def test_is_renamed_by_fresh(self, driver: Driver) -> None:
        assert main(["pipeline", "mine.yaml"]) == 0
        assert main(["pipeline", "mine.yaml", "pretrain.train.steps=3", "--fresh"]) == 0
        assert len(list(Path("runs").glob("mine*"))) == 2

    def test_is_not_made_by_a_dry_run(self, driver: Driver) -> None:
        assert main(["pipeline", "mine.yaml", "--dry-run"]) == 0
        assert not Path("runs").exists()
        assert driver.configs == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_one_ray_serves_all_steps_and_only_where_one_needs_it(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(pipeline_command, "connect", lambda: calls.append("connect") or True)
    monkeypatch.setattr(pipeline_command, "disconnect", lambda: calls.append("disconnect"))
    assert main(["pipeline", "mine.yaml", f"cluster.num_train_workers={workers}"]) == 0
    assert calls == ["connect", "disconnect"] * workers
