"""Recognise a backbone by the names and shapes of its tensors."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from raysl.encoder.dinov2_names import LAYER_SCALE_NAME
from raysl.encoder.stored import State
from raysl.nn.resnet import LAYOUTS
from raysl.nn.vit import VIT_SIZES

_STAGES = (1, 2, 3, 4)
# Number of blocks of each stage, and channels of the first stage.
_CONVNEXTS = {
    "convnext_tiny": ((3, 3, 9, 3), 96),
    "convnext_small": ((3, 3, 27, 3), 96),
    "convnext_base": ((3, 3, 27, 3), 128),
}
# timm's names of DINOv2's sizes, by features and blocks; source: arXiv:2304.07193v2, table 17.
_DINOV2 = {(384, 12): "small", (768, 12): "base", (1024, 24): "large", (1536, 40): "giant"}
_DINOV2_PATCH_PX, _DINOV2_REGISTERS = 14, 4
_IMAGENET_STEM_PX = 7
_CHANNELS = 64  # of the first stage at width 1


class Recognised(NamedTuple):
    """The settings of a recognised backbone."""

    section: dict[str, Any]
    """Settings of :class:`BackboneConfig`; without a name if raysl has no such backbone."""
    image_size_px: int | None
    """Side of the images that the position embeddings are made for; None without them."""
    assumptions: tuple[str, ...]
    """Settings that tensors do not show, described by :func:`assumed`."""


def assumed(setting: str, because: str, *, otherwise: str) -> str:
    """Describe an assumed setting in words.

    Args:
        setting: The assumed setting as an override: ``backbone.pool=cls``.
        because: The reason for the assumption.
        otherwise: Overrides with other values.
    """
    return f"{setting} ({because}); otherwise {otherwise}"


def recognise(state: State) -> Recognised:
    """Derive a backbone's settings from the names and shapes of its tensors.

    The section is empty if it is neither a ResNet, a ViT nor a ConvNeXt.
    """
    if "layer1.0.conv1.weight" in state or "layer1.0.conv1.conv.weight" in state:
        return _resnet(state)
    if "patch_embed.proj.weight" in state:
        return _vit(state)
    if "features.1.0.block.0.weight" in state:
        return _convnext(state)
    return Recognised({}, None, ())


def _resnet(state: State) -> Recognised:
    kernels = any(".conv1.conv." in name or ".conv2.conv." in name for name in state)
    bottleneck = "layer1.0.conv3.weight" in state
    blocks = tuple(_count(state, rf"layer{stage}\.(\d+)\.") for stage in _STAGES)
    deep_stem = "conv1.6.weight" in state
    stem = _shape(state, "conv1.6.weight" if deep_stem else "conv1.weight")
    channels = stem[0] if stem else 0
    # Selective kernels and basic blocks only occur in plain networks, the first in the table.
    inner = _shape(state, "layer1.0.conv2.weight") if bottleneck else None
    names = [
        name
        for name, layout in LAYOUTS.items()
        if (layout.bottleneck, layout.blocks) == (bottleneck, blocks)
        and (inner is None or _fits(layout.group_width, layout.groups, inner, channels))
    ]
    section: dict[str, Any] = {"name": names[0]} if names else {}
    assumptions = []
    if channels != _CHANNELS:
        section["width"] = channels / _CHANNELS
    if kernels:
        section["selective_kernels"] = True
    if not deep_stem and stem is not None and stem[-1] != _IMAGENET_STEM_PX:
        section["stem"] = "cifar"
        assumptions.append(
            assumed(
                "backbone.stem=cifar",
                "no tensor shows stride and padding",
                otherwise="backbone.stem=cifar_padded or backbone.stem=small",
            )
        )
    if not any(name.endswith("running_mean") for name in state):
        section["norm"] = "group"
        assumptions.append(
            assumed(
                "backbone.norm=group",
                "norm=none has the same tensors",
                otherwise="backbone.norm=none",
            )
        )
    return Recognised(section, None, tuple(assumptions))


def _fits(group_width: int, groups: int, inner: tuple[int, ...], channels: int) -> bool:
    """Return whether a bottleneck's 3 x 3 convolution matches a layout."""
    expected = channels * group_width // _CHANNELS * groups
    return inner[0] == expected and inner[1] * groups == expected


def _vit(state: State) -> Recognised:
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = _count(state, r"blocks\.(\d+)\.")
    side = _side(_shape(state, "pos_embed"))
    if LAYER_SCALE_NAME in state and patch == _DINOV2_PATCH_PX and (dim, depth) in _DINOV2:
        registers = _shape(state, "reg_token")
        if registers is None or registers[1] == _DINOV2_REGISTERS:
            with_registers = "_reg4" if registers else ""
            name = f"timm:vit_{_DINOV2[dim, depth]}_patch14{with_registers}_dinov2"
            return Recognised({"name": name}, side * patch or None, ())
    size = next((name for name, size in VIT_SIZES.items() if size.embed_dim == dim), None)
    section: dict[str, Any] = {"patch_size_px": patch}
    assumptions = []
    if "fc_norm.weight" in state:
        section["pool"] = "mean_norm"
    else:
        because = "the class token; the mean of the patches has the same tensors"
        assumptions.append(assumed("backbone.pool=cls", because, otherwise="backbone.pool=mean"))
    if size is not None:
        section["name"] = size
        if depth != VIT_SIZES[size].depth:
            section["depth"] = depth
        assumptions.append(_heads(size))
    return Recognised(section, side * patch or None, tuple(assumptions))


def _heads(size: str) -> str:
    heads, others = VIT_SIZES[size].num_heads, "backbone.num_heads=N"
    because = "one per 64 features as in DeiT" if size != "vit_huge" else "as in MAE"
    if VIT_SIZES[size].embed_dim < VIT_SIZES["vit_base"].embed_dim:
        because += "; MoCo v3 has 12 and the same tensors"
        others = "backbone.num_heads=12"
    return assumed(f"backbone.num_heads={heads}", because, otherwise=others)


def _side(positions: tuple[int, ...] | None) -> int:
    """Return the patches per side: position embeddings are a square, and one for a class token."""
    count = positions[1] if positions else 0
    side = math.isqrt(count)
    return side if side**2 == count else math.isqrt(count - 1)


def _convnext(state: State) -> Recognised:
    blocks = tuple(_count(state, rf"features\.{2 * stage - 1}\.(\d+)\.") for stage in _STAGES)
    signature = (blocks, state["features.1.0.block.0.weight"].shape[0])
    names = [name for name, known in _CONVNEXTS.items() if known == signature]
    return Recognised({"name": names[0]} if names else {}, None, ())


def _count(names: Iterable[str], pattern: str) -> int:
    """Count the distinct numbers that a pattern matches at the start of names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _shape(state: State, name: str) -> tuple[int, ...] | None:
    return state[name].shape if name in state else None
