"""Settings of a run that are without effect, and what configurations over each other keep."""

from pathlib import Path
from typing import Any

import pytest

from raysl.config.yaml_text import to_yaml
from raysl.errors import ConfigError
from raysl.methods import load_method, method_names
from raysl.run.recipe import RunConfig, idle_problems, load_run, run_from_user

BASE: dict[str, Any] = {
    "name": "a",
    "data": {"source": "digits"},
    "method": {"name": "simclr"},
    "train": {"steps": 2, "global_batch_size": 8},
}
ONE = {"recipe": "mae"}


def _method(name: str, **settings: Any) -> dict[str, Any]:
    views = ONE if load_method(name).Config.model_validate({"name": name}).num_views == 1 else {}
    data = {"source": "digits", "views": {"recipe": "simclr", **views}}
    return {"data": data, "method": {"name": name, **settings}}


IDLE: list[tuple[dict[str, Any], str]] = [
    ({"optim": {"name": "adamw", "sgd_momentum": 0.5}}, "optim.sgd_momentum"),
    ({"optim": {"name": "adamw", "nesterov": True}}, "optim.nesterov"),
    ({"optim": {"name": "lars", "nesterov": True}}, "optim.nesterov"),
    ({"optim": {"adam_betas": [0.9, 0.95]}}, "optim.adam_betas"),
    ({"optim": {"trust_coefficient": 0.02}}, "optim.trust_coefficient"),
    ({"optim": {"schedule": "constant", "final_lr_ratio": 0.1}}, "optim.final_lr_ratio"),
    ({"optim": {"weight_decay": 0.0, "decay_bias_and_norm": True}}, "optim.decay_bias_and_norm"),
    ({"adversary_optim": {"base_lr": 0.1}}, "adversary_optim"),
    ({"backbone": {"batch_norm_splits": 4}}, "backbone.batch_norm_splits"),
    ({"health": {"min_feature_std": 0.0, "patience": 9}}, "health.patience"),
    ({"track": {"log_model": False, "registered_model": "x"}}, "track.registered_model"),
    ({"evaluate": {"every": None, "online": "blocking"}}, "evaluate.online"),
    *(
        ({"evaluate": {name: value}}, f"evaluate.{name}")
        for name, value in {
            "split": "test",
            "limit": 5,
            "label_column": "x",
            "image_column": "x",
            "filter": [["path", "==", "x"]],
            "pages": "first",
        }.items()
    ),
    ({"evaluate": {"source": "digits", "label_column": "x"}}, "evaluate.label_column"),
    ({"data": {"source": "digits", "intensity": {"bits": 12}}}, "data.intensity"),
    ({"data": {"source": "cifar10", "label_column": "x"}}, "data.label_column"),
    (
        {"data": {"source": "x", "mix": [{"source": "digits", "pages": "first"}]}},
        "data.mix.0.pages",
    ),
    ({"data": {"source": "digits", "labels": {"fraction": 0.5}}}, "data.labels.fraction"),
    ({"data": {"source": "digits", "labels": {"only": True, "seed": 3}}}, "data.labels.seed"),
    (
        {"data": {"source": "x", "bad_images": {"policy": "fail", "max_share": 0.5}}},
        "data.bad_images.max_share",
    ),
    (
        {"data": {"source": "x", "views": {"color_strength": 0.0, "color_prob": 0.1}}},
        "data.views.color_prob",
    ),
    (
        {
            "data": {
                "source": "x",
                "views": {"recipe": "dino", "local_count": 0, "local_size_px": 9},
            }
        },
        "data.views.local_size_px",
    ),
    ({**_method("simclr", memory_length=8)}, "method.memory_length"),
    ({**_method("simclr", ema_momentum=0.9)}, "method.ema_momentum"),
    *(
        (_method(name, projection_layers=1, hidden_dim=8), "method.hidden_dim")
        for name in ("simclr", "sigmoid", "margin", "barlow", "vicreg", "simsiam")
    ),
    (_method("swav", queue_start={"steps": 3}), "method.queue_start"),
    (_method("dino", head_layers=1, hidden_dim=8), "method.hidden_dim"),
    (
        _method(
            "dino",
            teacher_temperature_warmup={"steps": 0},
            warmup_teacher_temperature=0.02,
        ),
        "method.warmup_teacher_temperature",
    ),
    (_method("nce", class_power=0.5), "method.class_power"),
    (_method("mae", decoder_depth=0, decoder_heads=8), "method.decoder_heads"),
    (_method("jigsaw", arrangement="mosaic", tile_dim=8), "method.tile_dim"),
    (_method("context_encoder", num_blocks=3), "method.num_blocks"),
    (_method("context_encoder", mask="blocks", overlap=0.1), "method.overlap"),
    (_method("context_encoder", overlap=0.0, overlap_weight=2.0), "method.overlap_weight"),
    (
        _method("context_encoder", adversarial_weight=0.0, discriminator_width=8),
        "method.discriminator_width",
    ),
    (_method("distill", teacher="x", temperature_squared=True), "method.temperature_squared"),
    (_method("ebm", num_noise=3), "method.num_noise"),
    (_method("ebm", training="nce", langevin_steps=3), "method.langevin_steps"),
    (_method("ebm", training="nce", noise_std_range=[0.1, 0.2]), "method.noise_std_range"),
    (_method("ebm", perturbations=["turn"]), "method.perturbations"),
    (
        _method("ebm", restart_prob=0.0, restart_from="data"),
        "method.restart_from",
    ),
    ({**_method("supervised"), "evaluate": {"finetune": {"epochs": 3}}}, "evaluate.finetune"),
]


@pytest.mark.parametrize(("sections", "key"), IDLE, ids=[key for _, key in IDLE])
def test_is_refused(sections: dict[str, Any], key: str) -> None:
    problems = [problem.text for problem in idle_problems(BASE | sections)]
    assert len(problems) == 1
    assert problems[0].startswith(f"{key}=")
    assert " does nothing with " in problems[0]
    with pytest.raises(ConfigError, match="does nothing"):
        run_from_user(BASE | sections, where="x")


def test_an_adversary_is_neither_clipped_nor_layered() -> None:
    given = _method("context_encoder") | {"adversary_optim": {"max_grad_norm": 1.0}}
    (problem,) = idle_problems(BASE | given)
    assert "for an adversary, which is no encoder and not clipped" in problem.text
    assert not idle_problems(BASE | _method("context_encoder") | {"adversary_optim": {}})


@pytest.mark.parametrize("name", method_names())
def test_the_defaults_of_every_method_are_of_use(name: str) -> None:
    run = BASE | _method(name)
    assert idle_problems(run) == []
    model = RunConfig[load_method(name).Config]  # type: ignore[name-defined]
    dumped = model.model_construct(**BASE).model_dump(mode="json", warnings=False)
    assert idle_problems(run | {"optim": dumped["optim"], "health": dumped["health"]}) == []


@pytest.mark.parametrize("method", [None, {}, {"name": "nothing"}, {"name": "simclr", "x": 1}, 3])
def test_a_method_that_is_not_sound_is_no_problem_of_this(method: Any) -> None:
    assert idle_problems(BASE | {"method": method, "optim": {"name": 7}}) == []


class TestLayers:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        memory = {"name": "simclr", "memory": True, "memory_length": 64}
        optim = {"name": "lars", "trust_coefficient": 0.02}
        (tmp_path / "base.yaml").write_text(to_yaml(BASE | {"method": memory, "optim": optim}))
        return tmp_path

    def test_a_child_that_puts_something_out_of_use_leaves_it_behind(self, files: Path) -> None:
        child = files / "child.yaml"
        child.write_text("extends: base.yaml\nmethod: {memory: false}\n")
        assert load_run(child).method.memory_length is None
        assert load_run(files / "base.yaml").method.memory_length == 64

    def test_so_does_an_override(self, files: Path) -> None:
        run = load_run(files / "base.yaml", ["method.memory=false", "optim.name=sgd"])
        assert (run.method.memory_length, run.optim.trust_coefficient) == (None, 0.001)

    def test_a_child_that_gives_both_is_refused(self, files: Path) -> None:
        child = files / "child.yaml"
        child.write_text("extends: base.yaml\nmethod: {memory: false, memory_length: 32}\n")
        with pytest.raises(ConfigError, match=r"method\.memory_length=32 does nothing with"):
            load_run(child)
        with pytest.raises(ConfigError, match=r"method\.memory_length=9 does nothing with"):
            load_run(files / "base.yaml", ["method.memory=false", "method.memory_length=9"])

    def test_what_is_idle_in_a_file_stays_so_under_overrides(self, files: Path) -> None:
        path = files / "bad.yaml"
        path.write_text("extends: base.yaml\noptim: {name: lars, nesterov: true}\n")
        with pytest.raises(ConfigError, match=r"optim\.nesterov=true does nothing"):
            load_run(path, ["seed=3"])

    def test_what_a_part_of_a_file_needs_may_stand_above_it(self, files: Path) -> None:
        part = files / "part.yaml"
        part.write_text(to_yaml(BASE | {"method": {"name": "simclr", "memory_length": 64}}))
        with pytest.raises(ConfigError, match=r"method\.memory_length=64 does nothing"):
            load_run(part)
        assert load_run(part, ["method.memory=true"]).method.memory_length == 64

    def test_a_dump_loads_again(self, files: Path) -> None:
        run = load_run(files / "base.yaml", ["method.memory=false"])
        (files / "dump.yaml").write_text(to_yaml(run.model_dump(mode="json")))
        assert load_run(files / "dump.yaml") == run
