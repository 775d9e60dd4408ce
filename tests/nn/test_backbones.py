import importlib
from typing import Any

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn

from raysl.errors import ConfigError
from raysl.nn.backbones import (
    NAMES,
    Backbone,
    BackboneConfig,
    build_backbone,
    check_model_name,
)
from raysl.nn.resnet import ResNet
from raysl.nn.vit import VisionTransformer


def build(name: str, size: int = 32, **options: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name=name, **options), image_size_px=size)


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_stands_alone_builds(name: str) -> None:
    with torch.device("meta"):
        backbone = build(name)
        assert backbone(torch.empty(2, 3, 32, 32)).shape == (2, backbone.embed_dim)


def test_every_field_reaches_the_residual_network() -> None:
    backbone = build(
        "resnet18",
        stem="small",
        width=0.5,
        selective_kernels=True,
        shortcut_edge="zeros",
        norm="none",
        zero_init_residual=True,
    )
    assert isinstance(backbone.net, ResNet)
    assert backbone.embed_dim == 256
    expected = {"conv1.weight": (32, 3, 3, 3), "layer1.0.conv1.conv.weight": (64, 32, 3, 3)}
    state = backbone.net.state_dict()
    assert expected.items() <= {name: tuple(value.shape) for name, value in state.items()}.items()
    assert "bn1.running_mean" not in state
    assert not state["layer1.0.bn2.weight"].any()
    assert isinstance(backbone.net.maxpool, nn.Identity)
    shortcut = backbone.net.layer2[0].downsample
    assert shortcut[0].edge == "zeros"  # type: ignore[index, union-attr]


def test_every_field_reaches_the_vision_transformer() -> None:
    net = build(
        "vit_tiny",
        patch_size_px=4,
        depth=2,
        drop_path=0.1,
        pool="mean",
        positions="sincos",
        init="moco_v3",
        norm_eps=1e-12,
    ).net
    assert isinstance(net, VisionTransformer)
    assert (net.image_size_px, net.patch_size_px, net.num_patches) == (32, 4, 64)
    assert (len(net.blocks), net.pool, net.embed_dim) == (2, "mean", 192)
    assert net.blocks[0].attn.num_heads == 3
    assert net.blocks[1].drop_path.prob == 0.1
    assert not net.pos_embed.requires_grad
    assert 0 < net.cls_token.abs().max() < 1e-5
    norms = [module for module in net.modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-12}


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8)]
)
def test_vision_transformers_have_the_published_number_of_parameters(
    name: str, millions: float
) -> None:
    with torch.device("meta"):
        backbone = build(name, size=224)
    count = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny", "torchvision:squeezenet1_1"])
def test_weights_are_a_function_of_the_global_seed(name: str) -> None:
    config = BackboneConfig(name=name)
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        backbone = build_backbone(config, image_size_px=32)
        weights.append(torch.cat([p.detach().flatten() for p in backbone.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class TestTorchvision:
    @pytest.mark.parametrize(
        ("name", "classifier"),
        [
            ("torchvision:mnasnet0_5", "classifier.1"),
            ("torchvision:mobilenet_v3_small", "classifier.3"),
            ("torchvision:shufflenet_v2_x0_5", "fc"),
            ("torchvision:squeezenet1_1", "classifier.1"),
        ],
    )
    def test_weights_load_strictly_into_its_own_class(self, name: str, classifier: str) -> None:
        backbone = build(name).eval()
        theirs = torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None)
        theirs.set_submodule(classifier, nn.Identity())
        theirs.load_state_dict(backbone.net.state_dict(), strict=True)
        with torch.no_grad():
            features = backbone(images())
            torch.testing.assert_close(features, theirs.eval()(images()), rtol=0, atol=1e-5)
        assert features.shape == (2, backbone.embed_dim)

    def test_transformers_are_laid_out_for_the_size(self) -> None:
        with torch.device("meta"):
            net = build("torchvision:vit_b_16", size=64).net
        assert net.get_parameter("encoder.pos_embedding").shape == (1, 17, 768)

    @pytest.mark.parametrize("prob", [0.0, 0.3])
    def test_convnext_takes_its_stochastic_depth_from_the_configuration(self, prob: float) -> None:
        with torch.device("meta"):
            net = build("convnext_tiny", drop_path=prob).net
        drops = [m.p for m in net.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
        assert (drops[0], drops[-1]) == (0, prob)

    def test_auxiliary_classifiers_are_left_out(self) -> None:
        backbone = build("torchvision:googlenet")
        assert backbone(images()).shape == (2, 1024)  # while training, too

    def test_sizes_that_a_model_cannot_take_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"alexnet cannot take images of 32 px: Given input"):
            build("torchvision:alexnet")
        with pytest.raises(ConfigError, match=r"vit_b_16 cannot take images of 30 px: "):
            build("torchvision:vit_b_16", size=30)


@pytest.mark.usefixtures("timm")
class TestTimm:
    @pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "resnet18.a1_in1k"])
    def test_weights_load_strictly_into_its_own_class(self, name: str, timm: Any) -> None:
        backbone = build(f"timm:{name}").eval()
        theirs = timm.create_model(name, num_classes=0).eval()
        theirs.load_state_dict(backbone.net.state_dict(), strict=True)
        with torch.no_grad():
            features = backbone(images())
            torch.testing.assert_close(features, theirs(images()), rtol=0, atol=1e-5)
        assert features.shape == (2, backbone.embed_dim)

    def test_transformers_are_laid_out_for_the_size_and_take_others(self) -> None:
        backbone = build("timm:vit_tiny_patch16_224", size=64)
        assert backbone.net.get_parameter("pos_embed").shape == (1, 17, 192)
        assert backbone(images(32)).shape == (2, 192)

    def test_sizes_that_a_model_cannot_take_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"dinov2 cannot take images of 32 px: .*patch size"):
            build("timm:vit_small_patch14_dinov2")

    def test_that_is_missing_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load = importlib.import_module

        def without_timm(name: str) -> Any:
            if name == "timm":
                raise ModuleNotFoundError("No module named 'timm'", name="timm")
            return load(name)

        monkeypatch.setattr(importlib, "import_module", without_timm)
        with pytest.raises(ConfigError, match=r"pip install raysl\[timm\]"):
            build("timm:resnet10t")

    def test_batch_norms_that_also_activate_are_not_replaced(self) -> None:
        with pytest.raises(ConfigError, match="cannot replace the BatchNormAct2d"):
            build("timm:mobilenetv3_small_050", batch_norm="sync")
        assert build("timm:resnet10t", batch_norm="sync").embed_dim == 512


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("resnet19", r"'resnet19' is not known; allowed: resnet18,.*did you mean resnet18 or"),
            ("vit_giant", "'vit_giant' is not known"),
            ("", "'' is not known"),
            ("keras:resnet50", "'keras:resnet50' is not known"),
        ],
    )
    def test_names_that_are_not_known(self, name: str, text: str) -> None:
        with pytest.raises(ValidationError, match=text):
            BackboneConfig(name=name)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("torchvision:efficentnet_b0", "torchvision has no .*did you mean efficientnet_b0"),
            ("torchvision:fcn_resnet50", "torchvision has no classifier of this name"),
            ("timm:convnext_ato", "timm has no .*did you mean convnext_atto"),
            ("timm:hf-hub:someone/model", "timm has no classifier of this name"),
            ("timm:", "timm has no classifier of this name"),
        ],
    )
    def test_names_that_a_library_does_not_know(self, name: str, text: str) -> None:
        if name.startswith("timm:"):
            pytest.importorskip("timm")
        config = BackboneConfig(name=name)
        for ask in (check_model_name, build_backbone):
            with pytest.raises(ConfigError, match=rf"^backbone.name={name}: {text}"):
                ask(config)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"name": "vit_tiny", "stem": "cifar"}, "stem is for resnet; vit_tiny has none"),
            ({"name": "resnet18", "drop_path": 0.1}, "drop_path is for vit and convnext; resnet18"),
            ({"name": "timm:resnet10t", "width": 2.0}, "width is for resnet; timm:resnet10t"),
            ({"name": "resnext50_32x4d", "width": 2.0}, "not for resnext50_32x4d"),
            ({"name": "wide_resnet50_2", "selective_kernels": True}, "not for wide_resnet50_2"),
            ({"shortcut_edge": "zeros"}, "shortcut_edge needs selective_kernels: true"),
            ({"width": 0.0}, "greater than or equal to 0.125"),
            ({"name": "vit_tiny", "drop_path": 1.0}, "less than 1"),
        ],
    )
    def test_fields_that_mean_nothing_here(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(ValidationError, match=text):
            BackboneConfig(**options)

    def test_views_that_do_not_divide_into_patches(self) -> None:
        config = BackboneConfig(name="vit_tiny", patch_size_px=8)
        with pytest.raises(ConfigError, match="patch_size_px=8 does not divide views of 36 px"):
            config.check_view_sizes([32, 36])
        with pytest.raises(ConfigError, match="does not divide views of 30 px"):
            build_backbone(config, image_size_px=30)
        BackboneConfig().check_view_sizes([33])


def test_attention_heads_are_those_of_the_name_or_as_given() -> None:
    with torch.device("meta"):
        vits: list[Any] = [build("vit_small", depth=1, num_heads=n).net for n in (None, 12)]
        assert [vit.blocks[0].attn.num_heads for vit in vits] == [6, 12]
        large: Any = build("vit_large").net
        assert len(large.blocks) == 24
    with pytest.raises(ValidationError, match="num_heads=5 does not divide the 192 features"):
        BackboneConfig(name="vit_tiny", num_heads=5)


def test_vision_transformers_are_known_as_such() -> None:
    names = [name for name in NAMES if BackboneConfig(name=name).is_vit]
    assert names == ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    assert not BackboneConfig(name="timm:vit_tiny_patch16_224").is_vit
