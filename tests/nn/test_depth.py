import pytest
import torch

from raysl.errors import ConfigError
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.depth import depth_scales
from raysl.optim.build import OptimConfig, Special, scheduled_optimizer


def by_name(config: BackboneConfig, *, decay: float) -> dict[str, float]:
    backbone = build_backbone(config, image_size_px=32)
    scales = depth_scales(backbone, config, decay=decay)
    return {name: scales[parameter] for name, parameter in backbone.net.named_parameters()}


def test_a_vit_s_are_those_of_beit_and_mae() -> None:
    """decay ** (L + 1 - layer): patches 0, block i is i + 1, all else L + 1."""
    found = by_name(BackboneConfig(name="vit_tiny", depth=4), decay=0.5)
    assert found["patch_embed.proj.weight"] == found["cls_token"] == found["pos_embed"] == 0.5**5
    for block in range(4):
        own = {v for name, v in found.items() if name.startswith(f"blocks.{block}.")}
        assert own == {0.5 ** (5 - (block + 1))}
    assert found["norm.weight"] == 1.0


def test_a_resnet_s_go_by_stage() -> None:
    found = by_name(BackboneConfig(name="resnet18", stem="small", width=0.125), decay=0.5)
    assert found["conv1.weight"] == found["bn1.bias"] == 0.5**5
    for stage in range(1, 5):
        own = {v for name, v in found.items() if name.startswith(f"layer{stage}.")}
        assert own == {0.5 ** (5 - stage)}


def test_other_encoders_are_refused() -> None:
    config = BackboneConfig(name="convnext_tiny")
    with pytest.raises(ConfigError, match=r"optim\.layer_decay counts the blocks.*convnext_tiny"):
        depth_scales(build_backbone(config), config, decay=0.5)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_an_optimizer_multiplies_each_rate(name: str) -> None:
    low, high = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = scheduled_optimizer(
        [low, high],
        OptimConfig.model_validate({"name": name, "base_lr": 1.0, "schedule": "constant"}),
        global_batch_size=256,
        steps_per_epoch=1,
        total_steps=4,
        special=Special(lr_scales={low: 0.25}),
    )
    optimizer.prepare(2)
    rates = {id(g["params"][0]): g["lr"] for g in optimizer.optimizer.param_groups}
    assert rates == {id(low): 0.25, id(high): 1.0}


def test_lars_leaves_a_classifier_unadapted_and_others_do_not_notice() -> None:
    weight, classifier = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    special = Special(unadapted={classifier})
    sizes = {"global_batch_size": 256, "steps_per_epoch": 1, "total_steps": 4}
    lars = scheduled_optimizer(
        [weight, classifier], OptimConfig(name="lars", base_lr=0.5), special=special, **sizes
    )
    lars.prepare(0)
    weight.grad = torch.ones(2, 2)
    classifier.grad = torch.ones(2, 2)
    lars.optimizer.step()
    torch.testing.assert_close(classifier.detach(), torch.full((2, 2), 0.5))
    assert float(weight.detach().min()) > 0.99  # 0.001 of its norm
    sgd = scheduled_optimizer([weight, classifier], OptimConfig(), special=special, **sizes)
    assert len(sgd.optimizer.param_groups) == 1
