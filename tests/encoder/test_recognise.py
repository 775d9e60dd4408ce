from typing import Any

import pytest
import torch

from raysl.encoder.recognise import recognise
from raysl.encoder.stored import StoredTensor
from raysl.nn.backbones import NAMES, BackboneConfig, build_backbone

SECTIONS: list[dict[str, Any]] = [
    *({"name": name} for name in NAMES),
    {"name": "resnet18", "width": 0.5, "stem": "cifar"},
    {"name": "resnet34", "width": 2.0},
    {"name": "resnet50", "width": 4.0},
    {"name": "resnet50", "width": 2.0, "selective_kernels": True},
    {"name": "resnet101", "selective_kernels": True, "stem": "cifar"},
    {"name": "resnet18", "selective_kernels": True},
    {"name": "resnet18", "norm": "group"},
    {"name": "vit_small", "patch_size_px": 8, "depth": 3, "pool": "mean_norm"},
    {"name": "vit_huge", "patch_size_px": 14},
]


@pytest.mark.parametrize(
    "section", SECTIONS, ids=lambda section: "-".join(map(str, section.values()))
)
def test_a_backbone_is_told_by_the_names_and_shapes_of_its_tensors(section: dict[str, Any]) -> None:
    config = BackboneConfig(**section)
    size = 8 * config.patch_size_px
    with torch.device("meta"):
        state = build_backbone(config, image_size_px=size).net.state_dict()

    def never() -> torch.Tensor:
        raise AssertionError("nothing is read")

    stored = {name: StoredTensor(tuple(value.shape), never) for name, value in state.items()}
    found = recognise(stored)
    assert BackboneConfig(**found.section) == config
    assert found.image_size_px == (size if config.is_vit else None)


def test_what_the_tensors_do_not_tell_is_said() -> None:
    def guesses(**section: Any) -> tuple[str, ...]:
        with torch.device("meta"):
            net = build_backbone(BackboneConfig(**section), image_size_px=32).net
        state = {n: StoredTensor(tuple(v.shape), v.clone) for n, v in net.state_dict().items()}
        return recognise(state).assumptions

    assert guesses(name="resnet18") == guesses(name="convnext_tiny") == ()
    assert "backbone.stem=cifar" in guesses(name="resnet18", stem="small")[0]
    assert "backbone.norm=group" in guesses(name="resnet18", norm="none")[0]
    assert "backbone.pool=cls" in guesses(name="vit_tiny", patch_size_px=8)[0]


@pytest.mark.parametrize("dim", [100, 512])
def test_a_size_without_a_name_has_no_name(dim: int) -> None:
    shapes = {"patch_embed.proj.weight": (dim, 3, 4, 4), "pos_embed": (1, 65, dim)}
    state = {name: StoredTensor(shape, lambda: torch.empty(0)) for name, shape in shapes.items()}
    found = recognise(state)
    assert "name" not in found.section
    assert found.image_size_px == 32


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(
    ("dim", "depth", "name"), [(384, 12, "small"), (1024, 24, "large"), (1536, 40, "giant")]
)
def test_dinov2_is_timms(dim: int, depth: int, name: str, registers: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, 3, 14, 14),
        # With registers the class token's position is in the token.
        "pos_embed": (1, 37**2 + (registers == 0), dim),
        **{f"blocks.{block}.ls1.gamma": (dim,) for block in range(depth)},
    }
    shapes |= {"reg_token": (1, registers, dim)} if registers else {}
    found = recognise({n: StoredTensor(s, lambda: torch.empty(0)) for n, s in shapes.items()})
    kind = "_reg4" if registers else ""
    assert found.section == {"name": f"timm:vit_{name}_patch14{kind}_dinov2"}
    assert found.image_size_px == 518


def test_heads_that_are_assumed_name_what_sets_them_otherwise() -> None:
    with torch.device("meta"):
        net = build_backbone(BackboneConfig(name="vit_small", depth=1), image_size_px=32).net
    state = {n: StoredTensor(tuple(v.shape), v.clone) for n, v in net.state_dict().items()}
    heads = recognise(state).assumptions[1]
    assert heads.startswith("backbone.num_heads=6 (")
    assert heads.endswith("; otherwise backbone.num_heads=12")
