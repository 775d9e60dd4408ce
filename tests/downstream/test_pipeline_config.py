from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.config.load import validate
from raysl.config.yaml_text import to_yaml
from raysl.downstream.pipeline import PipelineConfig, RunConfigs, Step, load_pipeline, plan_steps
from raysl.errors import ConfigError
from raysl.run.recipe import RunConfig

FOLDER = Path(__file__).parents[2] / "configs" / "pipelines"
PIPELINES = sorted(FOLDER.glob("*.yaml"))
every_pipeline = pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)

PRETRAIN: dict[str, Any] = {
    "backbone.width": 0.125,
    "backbone.stem": "small",
    "method.projection_layers": 3,
}


def make(**sections: Any) -> PipelineConfig:
    values = {"name": "p", "base": "base.yaml", **sections}
    return validate(PipelineConfig, values, where="test")


def names(**sections: Any) -> list[str]:
    return [step.name for step in plan_steps(make(**sections))]


@pytest.fixture
def write(run_yaml: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a pipeline whose base is a small run on the digits."""
    run_yaml("base")

    def to(**sections: Any) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(to_yaml({"base": "base.yaml", "pretrain": PRETRAIN, **sections}))
        return path

    return to


class TestFiles:
    def test_its_name_is_the_files_and_its_base_lies_beside_it(
        self, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        config = load_pipeline(path)
        assert (config.name, config.base) == ("mine", str(tmp_path / "base.yaml"))
        assert load_pipeline(write(name="other")).name == "other"

    def test_all_bad_keys_are_listed(self, write: Callable[..., Path]) -> None:
        path = write(finetunee=[], distill=[{"name": "a/b"}], finetune=[{"start": "x"}])
        with pytest.raises(ConfigError) as caught:
            load_pipeline(path)
        heading, *lines = str(caught.value).split("\n")
        assert heading.startswith(f"{path}: ")
        assert any("did you mean 'finetune'?" in line for line in lines)
        assert any("finetune.0.start" in line for line in lines)
        assert any("distill.0.name" in line for line in lines)


class TestOverrides:
    def test_a_field_of_the_pipeline_changes_the_pipeline(self, write: Callable[..., Path]) -> None:
        more = ["name=b", "output_dir=out", "track.mlflow=false", "finetune=[{labels: [0.5]}]"]
        config = load_pipeline(write(), more)
        assert (config.name, config.output_dir, config.track.mlflow) == ("b", "out", False)
        assert [block.labels for block in config.finetune] == [(0.5,)]

    def test_a_dotted_setting_of_the_pretraining_is_one_key(
        self, write: Callable[..., Path]
    ) -> None:
        config = load_pipeline(write(), ["pretrain.train.epochs=5", "pretrain.backbone.width=0.25"])
        assert config.pretrain == PRETRAIN | {"train.epochs": 5, "backbone.width": 0.25}

    def test_a_setting_of_a_run_is_for_all_of_them(self, write: Callable[..., Path]) -> None:
        more = ["data.limit=50", "optim={base_lr: 0.1}", "seed=3", "set.evaluate.every=null"]
        config = load_pipeline(write(), more)
        assert config.set == {
            "data.limit": 50,
            "optim": {"base_lr": 0.1},
            "seed": 3,
            "evaluate.every": None,
        }

    @pytest.mark.parametrize(
        ("override", "answer"),
        [
            (
                "trainn.epochs=3",
                "'trainn' is a setting of neither a pipeline nor a run; did you mean 't",
            ),
            ("distil=[]", "did you mean 'distill'?"),
            ("qqqq=1", "known: adversary_optim, backbone, base, "),
            ("pretrain", "not of the form"),
        ],
    )
    def test_an_unknown_one_is_answered_with_the_nearest(
        self, write: Callable[..., Path], override: str, answer: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            load_pipeline(write(), [override])
        assert f"override {override!r}" in str(caught.value)
        assert answer in str(caught.value)


class TestPlan:
    def test_runs_come_after_what_they_begin_with_share_by_share(self) -> None:
        found = names(
            finetune=[
                {"labels": [0.1], "start": "random"},
                {"labels": [0.1], "head_layers": [0], "freeze_encoder": True},
                {"labels": [0.005, 0.1], "head_layers": [0, 1]},
            ],
            distill=[{"name": "same"}, {"name": "small", "teacher": "same"}],
        )
        assert found == [
            "pretrain",
            "scratch-10percent",
            "linear-10percent-layer0",
            "finetune-0.5percent-layer0",
            "finetune-0.5percent-layer1",
            "finetune-10percent-layer0",
            "finetune-10percent-layer1",
            "distill-0.5percent-same",
            "distill-10percent-same",
            "distill-0.5percent-small",
            "distill-10percent-small",
        ]

    def test_random_weights_have_no_layers_to_keep(self) -> None:
        random = {"labels": [0.1], "start": "random", "head_layers": [0, 1]}
        (step,) = plan_steps(make(finetune=[random]))[1:]
        assert (step.name, step.kind, step.head_layers) == ("scratch-10percent", "scratch", None)

    def test_a_teacher_is_a_layer_the_best_or_an_earlier_student(self) -> None:
        tuned = [{"labels": [0.1], "head_layers": [0, 2]}]
        students = [
            {"name": "two", "teacher": 2},
            {"name": "any", "teacher": "best"},
            {"name": "last", "teacher": "two"},
        ]
        steps = plan_steps(make(finetune=tuned, distill=students))
        assert [step.teachers for step in steps[3:]] == [
            ("finetune-10percent-layer2",),
            ("finetune-10percent-layer0", "finetune-10percent-layer2"),
            ("distill-10percent-two",),
        ]

    def test_a_student_has_a_run_for_each_share_that_has_its_teacher(self) -> None:
        tuned = [{"labels": [0.01], "head_layers": [0]}, {"labels": [0.1], "head_layers": [1]}]
        assert names(finetune=tuned, distill=[{"name": "s"}])[-1] == "distill-10percent-s"
        assert len(names(finetune=tuned, distill=[{"name": "s"}])) == 4

    def test_a_student_may_be_taught_on_some_shares_alone(self) -> None:
        tuned = [{"labels": [0.01, 0.1]}]
        found = names(finetune=tuned, distill=[{"name": "s", "labels": [0.1]}])
        assert found[3:] == ["distill-10percent-s"]

    @pytest.mark.parametrize(
        ("student", "answer"),
        [
            ({"teacher": 2}, "teacher=2, and there is no such run; there are finetune-10percent-l"),
            ({"teacher": "later"}, "teacher='later', and there is no such run"),
            ({"labels": [0.5]}, "no such run with 50 % of the labels"),
        ],
    )
    def test_a_student_without_a_teacher_is_refused(
        self, student: dict[str, Any], answer: str
    ) -> None:
        students = [{"name": "s"} | student, {"name": "later"}]
        with pytest.raises(ConfigError) as caught:
            plan_steps(make(finetune=[{"labels": [0.1]}], distill=students))
        assert answer in str(caught.value)

    def test_neither_random_weights_nor_a_frozen_encoder_teach(self) -> None:
        blocks = [
            {"labels": [0.1], "start": "random"},
            {"labels": [0.1], "head_layers": [0, 1], "freeze_encoder": True},
        ]
        for teacher in (0, 1, "best"):
            with pytest.raises(ConfigError, match="there are none"):
                plan_steps(make(finetune=blocks, distill=[{"name": "s", "teacher": teacher}]))

    @pytest.mark.parametrize(
        ("sections", "twice"),
        [
            (
                {"finetune": [{"labels": [0.1]}, {"labels": [0.1, 0.2]}]},
                "finetune-10percent-layer1",
            ),
            ({"finetune": [{"labels": [0.1, 0.1]}]}, "finetune-10percent-layer1"),
            (
                {
                    "finetune": [{"labels": [0.1]}],
                    "distill": [{"name": "s"}, {"name": "s", "set": {"backbone.width": 0.5}}],
                },
                "distill-10percent-s",
            ),
        ],
    )
    def test_the_same_name_twice_is_refused(self, sections: dict[str, Any], twice: str) -> None:
        with pytest.raises(ConfigError, match=f"the steps {twice} occur twice"):
            plan_steps(make(**sections))


def configs(config: PipelineConfig, folder: Path) -> dict[str, tuple[Step, RunConfig[Any]]]:
    """Return every run of a pipeline; of several teachers the first one teaches."""
    runs = RunConfigs(config, folder)
    return {
        step.name: (step, runs.config(step, step.teachers[0] if step.teachers else None))
        for step in plan_steps(config)
    }


class TestRuns:
    @pytest.fixture
    def found(
        self, write: Callable[..., Path], tmp_path: Path
    ) -> dict[str, tuple[Step, RunConfig[Any]]]:
        path = write(
            set={"evaluate.every": None, "train.steps": 3, "train.epochs": None},
            finetune=[
                {"labels": [0.2], "start": "random"},
                {"labels": [0.2], "head_layers": [0], "freeze_encoder": True},
                {"labels": [0.2], "head_layers": [2], "set": {"train.steps": 4}},
            ],
            distill=[{"name": "small", "teacher": 2, "set": {"backbone.width": 0.25}}],
            track={"mlflow": False, "experiment": "mine"},
        )
        return configs(load_pipeline(path), tmp_path / "out")

    def test_each_has_a_folder_below_the_pipelines_and_its_tracking(
        self, found: dict[str, tuple[Step, RunConfig[Any]]], tmp_path: Path
    ) -> None:
        for name, (_, run) in found.items():
            assert (run.name, run.output_dir) == (name, str(tmp_path / "out"))
            assert (run.track.experiment, run.evaluate.every) == ("mine", None)

    def test_a_steps_own_settings_win_over_those_of_all(
        self, found: dict[str, tuple[Step, RunConfig[Any]]]
    ) -> None:
        steps = {name: run.train.steps for name, (_, run) in found.items()}
        assert steps.pop("finetune-20percent-layer2") == 4
        assert set(steps.values()) == {3}

    def test_each_begins_where_its_kind_says(
        self, found: dict[str, tuple[Step, RunConfig[Any]]], tmp_path: Path
    ) -> None:
        pretrained = tmp_path / "out" / "pretrain"
        begins = {
            step.kind: (run.backbone.weights, run.method.model_dump().get("head_layers"))
            for step, run in found.values()
        }
        assert begins == {
            "pretrain": (None, None),
            "scratch": (None, 0),
            "linear": (str(pretrained / "encoder.safetensors"), 0),
            "finetune": (str(pretrained / "encoder.safetensors"), 2),
            "distill": (None, None),
        }
        methods = {step.kind: run.method for step, run in found.values()}
        assert [methods[kind].freeze_encoder for kind in ("scratch", "linear", "finetune")] == [
            False,
            True,
            False,
        ]
        teacher = tmp_path / "out" / "finetune-20percent-layer2"
        assert methods["distill"].teacher == str(teacher)
        assert methods["distill"].temperature == 1.0  # it is wider than its teacher

    def test_all_that_see_a_share_see_the_same_labels(
        self, found: dict[str, tuple[Step, RunConfig[Any]]]
    ) -> None:
        seen = {
            (run.data.labels.fraction, run.data.labels.seed)
            for _, run in found.values()
            if run.data.labels is not None
        }
        assert seen == {(0.2, 0)}

    def test_more_layers_than_the_pretraining_will_have_are_refused(
        self, write: Callable[..., Path], tmp_path: Path
    ) -> None:
        config = load_pipeline(write(finetune=[{"labels": [0.2], "head_layers": [4]}]))
        with pytest.raises(ConfigError, match="use at most 3"):
            configs(config, tmp_path / "out")

    def test_a_bad_setting_names_the_step(self, write: Callable[..., Path], tmp_path: Path) -> None:
        block = {"labels": [0.2], "set": {"optim.base_lrr": 1}}
        with pytest.raises(ConfigError, match="step finetune-20percent-layer1") as caught:
            configs(load_pipeline(write(finetune=[block])), tmp_path / "out")
        assert "did you mean 'base_lr'?" in str(caught.value)


class TestTheRepositorys:
    @every_pipeline
    def test_loads_and_comes_back_the_same_from_its_own_dump(
        self, path: Path, tmp_path: Path
    ) -> None:
        config = load_pipeline(path)
        dumped = tmp_path / "dumped.yaml"
        dumped.write_text(to_yaml(config.model_dump(mode="json")))
        assert load_pipeline(dumped) == config
        assert config.name == path.stem

    @every_pipeline
    def test_all_its_steps_are_planned_and_its_pretraining_is_a_run(
        self, path: Path, tmp_path: Path
    ) -> None:
        config = load_pipeline(path)
        steps = plan_steps(config)
        assert {"pretrain", "finetune", "distill"} <= {step.kind for step in steps}
        run = RunConfigs(config, tmp_path).config(steps[0])
        assert (run.name, run.method.name) == ("pretrain", "simclr")
        deepest = max(step.head_layers or 0 for step in steps)
        assert deepest <= run.method.projection_head_layers(is_vit=run.backbone.is_vit)

    @every_pipeline
    def test_all_its_runs_are_sound_on_images_that_are_there(
        self, path: Path, tmp_path: Path
    ) -> None:
        few = ["data.source=digits", "data.limit=null", "train.global_batch_size=16"]
        few += ["evaluate.source=null", "cluster.num_train_workers=0"]
        found = configs(load_pipeline(path, few), tmp_path)
        assert all(name == run.name for name, (_, run) in found.items())

    @every_pipeline
    def test_opens_with_its_source_its_command_and_what_was_measured(self, path: Path) -> None:
        head = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        assert any(line.startswith("# Run: ") for line in head)
        assert f"configs/pipelines/{path.name}" in " ".join(head)
        assert any(line.startswith("# Measured: ") for line in head)
        assert "arXiv:" in " ".join(head)
