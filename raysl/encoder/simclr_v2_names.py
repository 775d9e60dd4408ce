"""Convert SimCLR v2's networks from the names of Separius/SimCLRv2-Pytorch to raysl's.

Source: resnet.py and convert.py of that repository. Networks with selective kernels have the stem
and the shortcuts of ResNet-D.
"""

import re

from raysl.encoder.stored import State

SIMCLR_V2_NAME = "net.1.blocks.0.net.0.weight"
"""A tensor name that only occurs in these files."""

# A norm and its ReLU are one child of a Sequential, whose first child is the norm.
_STEM = {"0": "conv1", "1.0": "bn1"}
_SELECTIVE_STEM = {
    **{"0": "conv1.0", "1.0": "conv1.1", "2": "conv1.3", "3.0": "conv1.4", "4": "conv1.6"},
    "5.0": "bn1",
}
_BLOCK = {
    **{"net.0": "conv1", "net.1.0": "bn1", "net.2": "conv2", "net.3.0": "bn2", "net.4": "conv3"},
    **{"net.5.0": "bn3", "projection.shortcut": "downsample.0", "projection.bn.0": "downsample.1"},
}
_SELECTIVE_BLOCK = {
    **{"net.0": "conv1", "net.1.0": "bn1", "net.3": "conv3", "net.4.0": "bn3"},
    "net.2.main_conv.0": "conv2.conv",
    "net.2.main_conv.1.0": "conv2.bn",
    "net.2.mixing_conv.0": "conv2.squeeze",
    "net.2.mixing_conv.1.0": "conv2.squeeze_bn",
    "net.2.mixing_conv.2": "conv2.mix",
    **{"projection.shortcut.2": "downsample.1", "projection.bn.0": "downsample.2"},
}


def from_simclr_v2(state: State) -> State:
    """Return the tensors under the names of :class:`raysl.nn.resnet.ResNet`."""
    selective = any(".mixing_conv." in name for name in state)
    stem, block = (_SELECTIVE_STEM, _SELECTIVE_BLOCK) if selective else (_STEM, _BLOCK)
    return {_name(name, stem, block): value for name, value in state.items()}


def _name(name: str, stem: dict[str, str], block: dict[str, str]) -> str:
    layer, _, what = name.rpartition(".")
    match = re.fullmatch(r"net\.(\d+)\.(?:blocks\.(\d+)\.)?(.+)", layer)
    if match is None:
        return name
    if match[2] is None:
        return f"{stem.get(match[3], layer)}.{what}"
    return f"layer{match[1]}.{match[2]}.{block.get(match[3], match[3])}.{what}"
