from typing import get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn

from raysl.nn.backbones import Backbone, ResNetName, build_backbone


def shape_after_stem(backbone: Backbone, images: Tensor) -> tuple[int, ...]:
    shapes: list[tuple[int, ...]] = []
    backbone.net.layer1.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    with torch.no_grad():
        backbone.eval()(images)
    return tuple(shapes[0])


@pytest.mark.parametrize("name", get_args(ResNetName))
def test_every_name_that_a_configuration_may_hold_builds(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
    assert isinstance(backbone.net.fc, nn.Identity)
    assert backbone.embed_dim == (512 if name in ("resnet18", "resnet34") else 2048)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("cifar", 32)])
def test_stem_for_small_images_keeps_their_resolution(stem: str, side: int) -> None:
    backbone = build_backbone("resnet18", stem=stem)
    assert shape_after_stem(backbone, torch.zeros(1, 3, 32, 32)) == (1, 64, side, side)


def test_weights_load_strictly_into_torchvision_and_give_the_same_features() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18").eval()
    plain = torchvision.models.resnet18(weights=None)
    plain.fc = nn.Identity()
    plain.load_state_dict(backbone.net.state_dict(), strict=True)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(backbone(images), plain.eval()(images))


def test_weights_are_a_function_of_the_global_seed() -> None:
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(build_backbone("resnet18", stem="cifar").net.conv1.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_small_stem_has_the_spread_of_he_initialisation() -> None:
    torch.manual_seed(0)
    weight = build_backbone("resnet18", stem="cifar").net.conv1.weight
    assert weight.shape == (64, 3, 3, 3)
    assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("zero", [True, False])
def test_residual_branches_start_at_zero_only_if_asked(zero: bool) -> None:
    net = build_backbone("resnet18", zero_init_residual=zero).net
    scales = [m.bn2.weight for m in net.modules() if hasattr(m, "bn2")]
    assert len(scales) == 8
    assert all(float(scale.detach().abs().sum()) == (0 if zero else len(scale)) for scale in scales)
