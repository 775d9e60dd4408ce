import math
from typing import Any

import pytest
import torch
from torch import nn

from raysl.config.base import Duration
from raysl.methods.base import TrainingSet
from raysl.methods.simclr import SimCLR, SimCLRConfig
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.optim.build import (
    OptimConfig,
    Special,
    build_optimizer,
    lr_at,
    param_groups,
    peak_lr,
    scheduled_optimizer,
)
from raysl.optim.lars import LARS


class TestPeakLr:
    @pytest.mark.parametrize(
        ("scaling", "expected"), [("linear", 0.3 * 16), ("sqrt", 0.3 * 4), ("none", 0.3)]
    )
    def test_grows_with_the_batch_as_asked(self, scaling: Any, expected: float) -> None:
        config = OptimConfig(base_lr=0.3, lr_scaling=scaling)
        assert peak_lr(config, global_batch_size=4096) == pytest.approx(expected)

    @pytest.mark.parametrize("scaling", ["linear", "sqrt", "none"])
    def test_for_256_images_is_the_base_rate(self, scaling: Any) -> None:
        assert peak_lr(OptimConfig(base_lr=0.3, lr_scaling=scaling), global_batch_size=256) == 0.3


class TestLrAt:
    def lr(self, step: int, **settings: Any) -> float:
        config = OptimConfig(**settings)
        return lr_at(config, step, peak=2.0, steps_per_epoch=10, total_steps=100)

    def test_warm_up_in_epochs_rises_to_the_peak(self) -> None:
        warmup = Duration(epochs=2.0)
        assert self.lr(0, warmup=warmup) == pytest.approx(2.0 / 20)
        assert self.lr(19, warmup=warmup) == pytest.approx(2.0)
        assert self.lr(20, warmup=warmup) == pytest.approx(2.0)

    @pytest.mark.parametrize("warmup", [Duration(steps=20), Duration(fraction=0.2)])
    def test_warm_up_means_the_same_in_every_unit(self, warmup: Duration) -> None:
        for step in (0, 7, 19, 20, 50):
            assert self.lr(step, warmup=warmup) == self.lr(step, warmup=Duration(epochs=2.0))

    def test_cosine_falls_to_the_final_ratio(self) -> None:
        assert self.lr(50) == pytest.approx(1.0)
        assert self.lr(100) == pytest.approx(0.0)
        assert self.lr(50, final_lr_ratio=0.1) == pytest.approx((2.0 + 0.2) / 2)
        assert self.lr(100, final_lr_ratio=0.1) == pytest.approx(0.2)
        expected = (1 + math.cos(math.pi * 25 / 80)) / 2 * 2.0
        assert self.lr(45, warmup=Duration(steps=20)) == pytest.approx(expected)

    def test_constant_stays_at_the_peak_whatever_the_final_ratio(self) -> None:
        values = {self.lr(step, schedule="constant", final_lr_ratio=0.1) for step in range(100)}
        assert values == {2.0}


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


class TestParamGroups:
    def test_matrices_and_kernels_decay_and_vectors_do_not(self) -> None:
        weights, vectors = param_groups(net().parameters(), OptimConfig(weight_decay=0.01))
        assert [tuple(p.shape) for p in weights["params"]] == [(4, 3, 3, 3), (2, 4)]
        assert [tuple(p.shape) for p in vectors["params"]] == [(4,), (4,), (4,), (2,)]
        assert (weights["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)

    def test_vectors_decay_too_if_asked(self) -> None:
        groups = param_groups(
            net().parameters(), OptimConfig(weight_decay=0.01, decay_bias_and_norm=True)
        )
        assert [group["weight_decay"] for group in groups] == [0.01, 0.01]

    def test_each_trainable_parameter_is_in_one_group_and_a_fixed_one_in_none(self) -> None:
        data = TrainingSet(num_images=64, global_batch_size=8, view_sizes_px=(32, 32))
        method = SimCLR(SimCLRConfig(), build_backbone(BackboneConfig(name="resnet18")), data)
        groups = param_groups(method.parameters(), OptimConfig())
        found = [id(p) for group in groups for p in group["params"]]
        trainable = {id(p) for p in method.parameters() if p.requires_grad}
        assert len(found) == len(set(found))
        assert set(found) == trainable
        assert len(trainable) == len(list(method.parameters())) - 1  # the head's last bias

    @pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
    def test_biases_and_norms_may_have_a_learning_rate_of_their_own(self, name: Any) -> None:
        """0.2 for weights and 0.0048 for the rest, for 256 images, as Barlow Twins' main.py."""
        config = OptimConfig(name=name, base_lr=0.2, bias_and_norm_lr_ratio=0.024)
        module = net()
        optimizer = scheduled_optimizer(
            module.parameters(), config, global_batch_size=2048, steps_per_epoch=5, total_steps=50
        )
        for step, height in ((0, 1.0), (25, 0.5)):
            optimizer.prepare(step)
            groups = optimizer.optimizer.param_groups
            lr = {id(p): group["lr"] for group in groups for p in group["params"]}
            for parameter in module.parameters():
                peak = 0.2 if parameter.ndim > 1 else 0.0048
                assert lr[id(parameter)] == pytest.approx(peak * 2048 / 256 * height)

    def test_that_rate_multiplies_others_and_leaves_unadapted_classifiers_alone(self) -> None:
        module = net()
        weight, bias = module[3].weight, module[3].bias
        special = Special(unadapted={weight, bias}, lr_scales={bias: 0.5, weight: 0.5})
        config = OptimConfig(name="lars", bias_and_norm_lr_ratio=0.1)
        groups = param_groups([weight, bias], config, special=special)
        scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        assert scales == {id(weight): 0.5, id(bias): pytest.approx(0.05)}

    def test_a_group_without_parameters_is_left_out(self) -> None:
        groups = param_groups(nn.Linear(3, 2, bias=False).parameters(), OptimConfig())
        assert [len(group["params"]) for group in groups] == [1]

    def test_lars_adapts_to_matrices_only(self) -> None:
        _, vectors = param_groups(net().parameters(), OptimConfig(name="lars"))
        assert vectors["adapt"] is False
        assert "adapt" not in param_groups(net().parameters(), OptimConfig(name="sgd"))[1]


class TestBuildOptimizer:
    def test_sgd_has_the_settings_of_the_configuration(self) -> None:
        config = OptimConfig(sgd_momentum=0.8, nesterov=True, weight_decay=0.01)
        optimizer = build_optimizer(net().parameters(), config)
        assert type(optimizer) is torch.optim.SGD
        for group, decay in zip(optimizer.param_groups, (0.01, 0.0), strict=True):
            assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (
                0.8,
                True,
                decay,
            )

    def test_adamw_has_the_settings_of_the_configuration(self) -> None:
        config = OptimConfig(name="adamw", adam_betas=(0.8, 0.95), weight_decay=0.05)
        optimizer = build_optimizer(net().parameters(), config)
        assert type(optimizer) is torch.optim.AdamW
        for group, decay in zip(optimizer.param_groups, (0.05, 0.0), strict=True):
            assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), decay)

    def test_lars_has_the_settings_of_the_configuration(self) -> None:
        config = OptimConfig(
            name="lars", sgd_momentum=0.8, weight_decay=0.01, trust_coefficient=0.02
        )
        optimizer = build_optimizer(net().parameters(), config)
        assert type(optimizer) is LARS
        weights, vectors = optimizer.param_groups
        assert (weights["adapt"], weights["weight_decay"]) == (True, 0.01)
        assert (vectors["adapt"], vectors["weight_decay"]) == (False, 0.0)
        assert {group["trust_coefficient"] for group in optimizer.param_groups} == {0.02}
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}

    @pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
    def test_every_optimizer_makes_a_small_loss_smaller(self, name: Any) -> None:
        torch.manual_seed(0)
        module = Backbone(net(), embed_dim=2)
        images = torch.randn(8, 3, 3, 3)
        optimizer = build_optimizer(
            module.parameters(), OptimConfig(name=name, base_lr=0.01, trust_coefficient=0.1)
        )
        losses = []
        for _ in range(10):
            loss = (module(images) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
