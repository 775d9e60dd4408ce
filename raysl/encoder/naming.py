"""Convert an encoder's parameter names from other conventions to those of raysl's networks."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from raysl.encoder.convnext import OF_TIMM, from_timm
from raysl.encoder.dinov2_names import dinov2_to_timm, is_dinov2
from raysl.encoder.simclr_v2_names import OF_SIMCLR_V2, from_simclr_v2
from raysl.encoder.stored import State
from raysl.encoder.transformers_names import (
    OF_RESNET,
    OF_VIT,
    resnet_from_transformers,
    vit_from_transformers,
)

NamingName = Literal["plain", "timm", "sequential", "transformers", "simclr_v2", "dinov2"]

OF_TORCHVISION = (
    "layer1.0.conv1.weight",
    "layer1.0.conv1.conv.weight",
    "features.1.0.block.0.weight",
)
OF_TIMMS_VIT = ("patch_embed.proj.weight",)

# torchvision's children in an nn.Sequential; the same without the stem's pooling, as in
# leftthomas/SimCLR; and those of lightly's ResNetGenerator, which also has no ReLU there.
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_UNPOOLED = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"}
_GENERATED = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}
# By the index of the first stage; indices of later stages are those of another variant's first.
_CHILDREN = {
    "2.0.conv1.weight": _GENERATED,
    "3.0.conv1.weight": _UNPOOLED,
    "4.0.conv1.weight": _SEQUENTIAL,
}

ANCHORS = (
    *(*OF_TORCHVISION, *OF_TIMMS_VIT, OF_TIMM, *_CHILDREN),
    *(OF_VIT, OF_RESNET, OF_SIMCLR_V2),
)
"""Names that mark the start of an encoder."""


class Named(NamedTuple):
    """An encoder under the names of raysl's networks."""

    state: State
    naming: NamingName
    """Its original naming; plain if the names were not changed."""


_BY_NAME: dict[str, tuple[NamingName, Callable[[State], State]]] = {
    OF_TIMM: ("timm", from_timm),
    OF_VIT: ("transformers", vit_from_transformers),
    OF_RESNET: ("transformers", resnet_from_transformers),
    OF_SIMCLR_V2: ("simclr_v2", from_simclr_v2),
}


def plainly_named(state: State) -> Named:
    """Return an encoder under torchvision's or timm's names."""
    for name, (naming, renamed) in _BY_NAME.items():
        if name in state:
            plain = renamed(state)
            return Named(dinov2_to_timm(plain) if is_dinov2(plain) else plain, naming)
    if is_dinov2(state):
        plain = dinov2_to_timm(state)
        return Named(plain, "plain" if plain.keys() == state.keys() else "dinov2")
    at = next((name for name in _CHILDREN if name in state and "0.weight" in state), None)
    children = {} if at is None else _CHILDREN[at]
    plain = {}
    for name, value in state.items():
        first, dot, rest = name.partition(".")
        new = children.get(first, first) + dot + rest
        plain[new.replace(".shortcut.", ".downsample.")] = value
    return Named(plain, "plain" if at is None else "sequential")
