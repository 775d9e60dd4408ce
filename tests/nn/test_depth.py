from typing import Any

import pytest
import torch

from raysl.errors import ConfigError
from raysl.nn.backbones import BackboneConfig, build_backbone
from raysl.nn.depth import check_layer_decay, depth_scales

DECAY = 0.5


def scales_by_name(config: BackboneConfig, decay: float = DECAY) -> dict[str, float]:
    torch.manual_seed(0)
    backbone = build_backbone(config, image_size_px=32)
    scales = depth_scales(backbone, config, decay=decay)
    return {name: scales[parameter] for name, parameter in backbone.net.named_parameters()}


class TestVisionTransformer:
    @pytest.mark.parametrize("depth", [1, 3])
    def test_a_layer_has_the_decay_to_the_power_of_the_layers_above_it(self, depth: int) -> None:
        config = BackboneConfig(name="vit_tiny", patch_size_px=16, depth=depth)
        found = scales_by_name(config)
        for name, scale in found.items():
            if name.startswith("blocks."):
                layer = int(name.split(".")[1]) + 1
            else:
                layer = depth + 1 if name.startswith("norm") else 0
            assert scale == DECAY ** (depth + 1 - layer), name
        assert {scale for scale in found.values()} == {DECAY**k for k in range(depth + 2)}

    def test_patches_class_token_and_positions_are_the_lowest_layer(self) -> None:
        found = scales_by_name(BackboneConfig(name="vit_tiny", depth=2))
        lowest = {name for name, scale in found.items() if scale == DECAY**3}
        assert lowest == {
            "cls_token",
            "pos_embed",
            "patch_embed.proj.weight",
            "patch_embed.proj.bias",
        }

    @pytest.mark.parametrize(("pool", "norm"), [("mean", "norm"), ("mean_norm", "fc_norm")])
    def test_last_norm_is_like_what_stands_on_the_encoder(self, pool: str, norm: str) -> None:
        values = {"name": "vit_tiny", "depth": 1, "pool": pool}
        found = scales_by_name(BackboneConfig.model_validate(values))
        top = {name for name, scale in found.items() if scale == 1}
        assert top == {f"{norm}.weight", f"{norm}.bias"}


class TestResNet:
    def test_has_a_stem_and_four_stages(self) -> None:
        found = scales_by_name(BackboneConfig(name="resnet18", stem="small", width=0.125))
        for name, scale in found.items():
            layer = int(name[5]) if name.startswith("layer") else 0
            assert scale == DECAY ** (5 - layer), name
        assert len(set(found.values())) == 5

    def test_selective_kernels_have_their_stages_too(self) -> None:
        config = BackboneConfig(name="resnet18", width=0.25, selective_kernels=True)
        found = scales_by_name(config)
        assert {scale for name, scale in found.items() if name.startswith("layer4.")} == {DECAY}
        assert len(set(found.values())) == 5


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18"])
def test_of_1_is_1_for_all(name: str) -> None:
    settings: dict[str, Any] = {"depth": 1} if name == "vit_tiny" else {"width": 0.125}
    config = BackboneConfig.model_validate({"name": name} | settings)
    assert set(scales_by_name(config, decay=1.0).values()) == {1.0}


@pytest.mark.parametrize("name", ["convnext_tiny", "torchvision:mnasnet0_5", "timm:resnet18"])
def test_layers_of_unknown_order_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"backbone\.name={name} is neither: .*set it to 1"):
        check_layer_decay(BackboneConfig(name=name), 0.5)
