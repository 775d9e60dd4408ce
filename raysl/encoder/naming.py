"""Convert an encoder's tensor names from other conventions to those of raysl's networks."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from raysl.encoder.convnext import TIMM_CONVNEXT_NAME, from_timm
from raysl.encoder.dinov2_names import dinov2_to_timm, is_dinov2
from raysl.encoder.simclr_v2_names import SIMCLR_V2_NAME, from_simclr_v2
from raysl.encoder.stored import State
from raysl.encoder.transformers_names import (
    TRANSFORMERS_RESNET_NAME,
    TRANSFORMERS_VIT_NAME,
    resnet_from_transformers,
    vit_from_transformers,
)

NamingName = Literal["plain", "timm", "sequential", "transformers", "simclr_v2", "dinov2"]

TORCHVISION_NAMES = (
    "layer1.0.conv1.weight",
    "layer1.0.conv1.conv.weight",
    "features.1.0.block.0.weight",
)
_TIMM_VIT_NAMES = ("patch_embed.proj.weight",)

# ResNets as an nn.Sequential: all children of torchvision's; without the stem's pooling, as in
# leftthomas/SimCLR; without its pooling and ReLU, as in lightly's ResNetGenerator.
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_UNPOOLED = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"}
_GENERATED = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}
# A tensor of the first stage identifies the variant. The smallest index is tried first, since a
# later stage may have the index that is the first stage's in another variant.
_CHILDREN = {
    "2.0.conv1.weight": _GENERATED,
    "3.0.conv1.weight": _UNPOOLED,
    "4.0.conv1.weight": _SEQUENTIAL,
}

ANCHORS = (
    *(*TORCHVISION_NAMES, *_TIMM_VIT_NAMES, TIMM_CONVNEXT_NAME, *_CHILDREN),
    *(TRANSFORMERS_VIT_NAME, TRANSFORMERS_RESNET_NAME, SIMCLR_V2_NAME),
)
"""Tensor names by which an encoder is found; each encoder has at least one."""


class Named(NamedTuple):
    """An encoder under the names of raysl's networks."""

    state: State
    naming: NamingName
    """The naming in the file; plain if no name was changed."""


_CONVERTERS: dict[str, tuple[NamingName, Callable[[State], State]]] = {
    TIMM_CONVNEXT_NAME: ("timm", from_timm),
    TRANSFORMERS_VIT_NAME: ("transformers", vit_from_transformers),
    TRANSFORMERS_RESNET_NAME: ("transformers", resnet_from_transformers),
    SIMCLR_V2_NAME: ("simclr_v2", from_simclr_v2),
}


def to_plain_names(state: State) -> Named:
    """Return an encoder under torchvision's or timm's names."""
    for name, (naming, convert) in _CONVERTERS.items():
        if name in state:
            plain = convert(state)
            return Named(dinov2_to_timm(plain) if is_dinov2(plain) else plain, naming)
    if is_dinov2(state):
        plain = dinov2_to_timm(state)
        return Named(plain, "plain" if plain.keys() == state.keys() else "dinov2")
    variant = next((name for name in _CHILDREN if name in state and "0.weight" in state), None)
    children = {} if variant is None else _CHILDREN[variant]
    plain = {}
    for name, value in state.items():
        first, dot, rest = name.partition(".")
        new = children.get(first, first) + dot + rest
        plain[new.replace(".shortcut.", ".downsample.")] = value
    return Named(plain, "plain" if variant is None else "sequential")
