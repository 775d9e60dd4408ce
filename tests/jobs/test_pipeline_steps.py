import re
from pathlib import Path
from typing import Any

import pytest

from raysl.config.load import validate
from raysl.errors import ConfigError
from raysl.jobs.pipeline import PipelineConfig, Runs, load_pipeline, plan_steps
from raysl.report.pipeline_page import draw_pipeline

BASE = """\
data: {source: digits, views: {recipe: simclr, size_px: 32}}
backbone: {name: resnet18, stem: small, width: 0.125}
method: {name: simclr, projection_layers: 3}
train: {epochs: 1}
"""


def config(**given: Any) -> PipelineConfig:
    values = {"name": "p", "base": "base.yaml"} | given
    return validate(PipelineConfig, values, where="test")


def names(pipeline: PipelineConfig) -> list[str]:
    return [step.name for step in plan_steps(pipeline)]


class TestPlan:
    def test_each_share_of_labels_and_layer_is_a_run(self) -> None:
        blocks = [
            {"labels": [0.01, 0.1], "head_layers": [0, 2]},
            {"labels": [0.1], "start": "random"},
            {"labels": [0.1], "head_layers": [0], "freeze_encoder": True},
        ]
        assert names(config(finetune=blocks)) == [
            "pretrain",
            "finetune-1percent-layer0",
            "finetune-1percent-layer2",
            "finetune-10percent-layer0",
            "finetune-10percent-layer2",
            "scratch-10percent",
            "linear-10percent-layer0",
        ]

    def test_students_have_teachers_by_layer_by_accuracy_or_by_name(self) -> None:
        blocks = [{"labels": [0.01, 0.1], "head_layers": [0, 1]}]
        students = [
            {"name": "a"},
            {"name": "b", "teacher": "best", "labels": [0.1]},
            {"name": "c", "teacher": "b"},
        ]
        steps = {step.name: step for step in plan_steps(config(finetune=blocks, distill=students))}
        assert steps["distill-1percent-a"].teachers == ("finetune-1percent-layer1",)
        assert len(steps["distill-10percent-b"].teachers) == 2
        assert steps["distill-10percent-c"].teachers == ("distill-10percent-b",)
        assert "distill-1percent-c" not in steps  # b was not asked for with so few

    @pytest.mark.parametrize(
        ("student", "message"),
        [
            (
                {"name": "a", "teacher": 2},
                "teacher=2, and there is no such run",
            ),
            ({"name": "a", "teacher": "b"}, "teacher='b'"),
            ({"name": "a", "labels": [0.5]}, "no such run with 50 % of the labels"),
        ],
    )
    def test_a_student_without_a_teacher_is_an_error(
        self, student: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            plan_steps(config(finetune=[{"head_layers": [1]}], distill=[student]))

    def test_a_step_that_stands_there_twice_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"finetune-1percent-layer1.*stand there twice"):
            plan_steps(config(finetune=[{"labels": [0.01]}, {"labels": [0.01]}]))


class TestRuns:
    def made(self, tmp_path: Path, **given: Any) -> dict[str, Any]:
        (tmp_path / "base.yaml").write_text(BASE)
        pipeline = config(base=str(tmp_path / "base.yaml"), **given)
        runs = Runs(pipeline, tmp_path / "p")
        found = {}
        for step in plan_steps(pipeline):
            found[step.name] = runs.config(step, next(iter(step.teachers), None))
        return found

    def test_settings_of_all_runs_yield_to_those_of_a_step(self, tmp_path: Path) -> None:
        found = self.made(
            tmp_path,
            set={"seed": 4, "train.epochs": 3},
            pretrain={"train.epochs": 2},
            finetune=[{"labels": [0.1], "head_layers": [1], "set": {"optim.base_lr": 0.5}}],
            distill=[{"name": "a", "set": {"train.epochs": 5, "backbone.width": 0.25}}],
        )
        assert [run.seed for run in found.values()] == [4, 4, 4]
        assert [run.train.epochs for run in found.values()] == [2, 3, 5]
        tuned = found["finetune-10percent-layer1"]
        assert tuned.optim.base_lr == 0.5
        assert tuned.method.head == str(tmp_path / "p" / "pretrain")
        student = found["distill-10percent-a"]
        assert student.method.teacher == str(tmp_path / "p" / "finetune-10percent-layer1")
        assert (student.backbone.width, student.backbone.weights) == (0.25, None)
        assert {Path(run.output_dir) for run in found.values()} == {tmp_path / "p"}

    def test_random_weights_are_random_and_frozen_ones_pretrained(self, tmp_path: Path) -> None:
        found = self.made(
            tmp_path,
            finetune=[
                {"labels": [0.1], "start": "random"},
                {"labels": [0.1], "head_layers": [0], "freeze_encoder": True},
            ],
        )
        scratch, linear = found["scratch-10percent"], found["linear-10percent-layer0"]
        assert (scratch.backbone.weights, scratch.method.head) == (None, None)
        assert linear.method.freeze_encoder
        assert linear.backbone.weights is not None

    def test_a_head_that_is_too_short_is_told_before_anything_starts(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"ends at layer 3; use at most 3"):
            self.made(tmp_path, finetune=[{"labels": [0.1], "head_layers": [4]}])


class TestLoad:
    def test_overrides_are_of_the_pipeline_or_of_all_runs(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("base: base.yaml\npretrain: {train.epochs: 1}\n")
        found = load_pipeline(
            path, ["pretrain.train.epochs=5", "data.source=digits", "set.seed=1", "name=other"]
        )
        assert found.pretrain == {"train.epochs": 5}
        assert found.set == {"data.source": "digits", "seed": 1}
        assert (found.name, found.base) == ("other", str(tmp_path / "base.yaml"))
        assert load_pipeline(path).name == "mine"
        with pytest.raises(ConfigError, match=r"'finetun' is neither of a pipeline.*'finetune'"):
            load_pipeline(path, ["finetun.labels=[0.1]"])


def test_the_report_shows_every_step_and_needs_no_network(tmp_path: Path) -> None:
    rows = [
        {
            "step": f"<{kind}>",
            "kind": kind,
            "labels": 0.1 if place else None,
            "num_labels": 50,
            "head_layers": 1 if kind == "finetune" else None,
            "teacher": None,
            "student": "small",
            "backbone": "resnet18",
            "top1": 0.1 * place if place else None,
            "seconds": 12.0,
        }
        for place, kind in enumerate(("pretrain", "scratch", "finetune", "distill"))
    ]
    assert draw_pipeline(tmp_path, name="p", rows=rows, settings="a: 1") == []
    page = (tmp_path / "report.html").read_text()
    for row in rows:
        assert f"&lt;{row['kind']}&gt;" in page
    assert "&lt;distill&gt;</code>, right in 30.0 %" in page
    assert "http" not in page.replace("Content-Security", "").replace("http-equiv", "")
    assert (tmp_path / "pictures" / "accuracy.png").stat().st_size > 1000
    assert draw_pipeline(tmp_path, name="p", rows=rows[:1], settings="") == []
