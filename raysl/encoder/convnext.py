"""Convert ConvNeXt between timm's and torchvision's names for the same network.

Liu et al. 2022, A ConvNet for the 2020s, arXiv:2201.03545v2.
"""

import re

from raysl.encoder.stored import State, StoredTensor

TIMM_CONVNEXT_NAME = "stages.0.blocks.0.conv_dw.weight"
"""A tensor name that only timm's ConvNeXt has."""

# timm's name of each layer of a block, by torchvision's index.
_BLOCK = {"0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}
_STEM = {"features.0.0.": "stem.0.", "features.0.1.": "stem.1.", "classifier.0.": "head.norm."}


def from_timm(state: State) -> State:
    """Return timm's tensors under torchvision's names."""
    return {_torchvision_name(name): _reshaped(name, value) for name, value in state.items()}


def timm_name(name: str) -> str:
    """Return timm's name for a tensor of torchvision's; other names are unchanged."""
    for ours, theirs in _STEM.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    match = re.fullmatch(r"features\.(\d+)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    child, index, rest = int(match[1]), match[2], match[3]
    if child % 2 == 0:  # torchvision's children: stem, stage 0, downsampling 1, stage 1, ...
        return f"stages.{child // 2}.downsample.{index}.{rest}"
    block = f"stages.{child // 2}.blocks.{index}"
    if rest == "layer_scale":
        return f"{block}.gamma"
    _, layer, what = rest.split(".")
    return f"{block}.{_BLOCK[layer]}.{what}"


def _torchvision_name(name: str) -> str:
    for ours, theirs in _STEM.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    match = re.fullmatch(r"stages\.(\d+)\.(downsample|blocks)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    stage, rest = int(match[1]), match[4]
    if match[2] == "downsample":
        return f"features.{2 * stage}.{match[3]}.{rest}"
    block = f"features.{2 * stage + 1}.{match[3]}"
    if rest == "gamma":
        return f"{block}.layer_scale"
    layer, _, what = rest.rpartition(".")
    index = next((key for key, value in _BLOCK.items() if value == layer), layer)
    return f"{block}.block.{index}.{what}"


def _reshaped(name: str, value: StoredTensor) -> StoredTensor:
    """Reshape layer scales from timm's ``(C,)`` to torchvision's ``(C, 1, 1)``."""
    if not name.endswith(".gamma") or len(value.shape) != 1:
        return value
    return StoredTensor((*value.shape, 1, 1), lambda: value.read()[:, None, None])
