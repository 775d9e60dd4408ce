"""Layer decay from the configuration to the learning rate of every parameter of a run."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from raysl.errors import ConfigError
from raysl.methods.base import Method, TrainingSet
from raysl.optim.build import OptimConfig, Special, param_groups
from raysl.run.build import build_method, build_optimizers
from raysl.run.recipe import Derived, RunConfig, derive, run_from_values

DATA = TrainingSet(64, 8, (32,), class_counts=(32, 32), class_names=("cat", "dog"))
VIT = {"name": "vit_tiny", "patch_size_px": 16, "depth": 2}


def run_config(backbone: dict[str, Any], **optim: Any) -> RunConfig[Any]:
    kinds = [{"count": 1, "size_px": 32}]
    values = {
        "name": "a-run",
        "data": {"source": "digits", "views": {"recipe": "custom", "kinds": kinds}},
        "backbone": backbone,
        "method": {"name": "supervised"},
        "optim": {"name": "adamw", "base_lr": 0.4, "lr_scaling": "none"} | optim,
        "train": {"steps": 10, "global_batch_size": 8},
    }
    return run_from_values(values, where="test")


def rates(config: RunConfig[Any], step: int) -> tuple[Method, dict[str, float]]:
    """The learning rate of each parameter at a step."""
    method = build_method(config, DATA, device=torch.device("cpu"))
    derived: Derived = derive(config, num_images=64)
    (optimizer,) = build_optimizers(method, config, derived)
    optimizer.prepare(step)
    lr = {p: group["lr"] for group in optimizer.optimizer.param_groups for p in group["params"]}
    return method, {name: lr[p] for name, p in method.named_parameters()}


class TestRun:
    @pytest.mark.parametrize("step", [0, 5])
    def test_each_block_has_the_rate_of_the_one_above_it_times_the_decay(self, step: int) -> None:
        config = run_config(VIT, layer_decay=0.65)
        _, found = rates(config, step)
        top = found["network.linear.weight"]
        assert top == pytest.approx([0.4, None, None, None, None, 0.2][step])
        layers = {"patch_embed": 0, "cls_token": 0, "pos_embed": 0, "norm": 3}
        for name, lr in found.items():
            _, part, *rest = name.split(".")
            if part == "linear":
                layer = 3
            elif rest[1] == "blocks":
                layer = int(rest[2]) + 1
            else:
                layer = layers[rest[1]]
            assert lr == pytest.approx(top * 0.65 ** (3 - layer)), name

    def test_of_1_all_have_the_same_rate_and_the_groups_that_they_had(self) -> None:
        method, found = rates(run_config(VIT, layer_decay=1.0), 0)
        assert set(found.values()) == {0.4}
        groups = param_groups(method.parameters(), OptimConfig(layer_decay=1.0))
        assert [group["decays"] for group in groups] == [True, False]

    def test_stages_of_a_resnet_are_layers(self) -> None:
        _, found = rates(run_config({"name": "resnet18", "width": 0.125}, layer_decay=0.5), 0)
        assert found["network.linear.weight"] == pytest.approx(0.4)
        assert found["network.encoder.net.layer4.0.conv1.weight"] == pytest.approx(0.2)
        assert found["network.encoder.net.conv1.weight"] == pytest.approx(0.4 / 2**5)

    def test_is_refused_where_the_layers_have_no_known_order(self) -> None:
        with pytest.raises(ConfigError, match=r"optim\.layer_decay counts .*=convnext_tiny is nei"):
            run_config({"name": "convnext_tiny"}, layer_decay=0.65)
        run_config({"name": "convnext_tiny"}, layer_decay=1.0)

    @pytest.mark.parametrize("wrong", [0.0, -0.5, 1.5])
    def test_grows_with_depth_or_vanishes_nowhere(self, wrong: float) -> None:
        with pytest.raises(ValidationError, match="layer_decay"):
            OptimConfig(layer_decay=wrong)


class TestParamGroups:
    def test_scales_split_weights_and_vectors_alike_and_keep_their_decay(self) -> None:
        low, high = nn.Linear(3, 4), nn.Linear(4, 2)
        scales = dict.fromkeys(low.parameters(), 0.25)
        groups = param_groups(
            [*low.parameters(), *high.parameters()],
            OptimConfig(weight_decay=0.01),
            special=Special(lr_scales=scales),
        )
        found = {
            id(p): (group["lr_scale"], group["weight_decay"])
            for group in groups
            for p in group["params"]
        }
        assert len(groups) == len(found) == 4
        assert found[id(low.weight)] == (0.25, 0.01)
        assert found[id(low.bias)] == (0.25, 0.0)
        assert found[id(high.weight)] == (1.0, 0.01)
        assert found[id(high.bias)] == (1.0, 0.0)
