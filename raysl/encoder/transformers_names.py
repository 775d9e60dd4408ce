"""Convert ViT, ViTMAE, DINOv2 and ResNet from the names of Hugging Face's transformers.

Source: transformers' modeling_vit.py, modeling_vit_mae.py, modeling_dinov2.py,
modeling_dinov2_with_registers.py and modeling_resnet.py. In version 5, ``save_pretrained`` writes
the names of version 4, but ``state_dict()`` has new names.
"""

import re

import torch
from torch import Tensor

from raysl.encoder.stored import State, StoredTensor

TRANSFORMERS_VIT_NAME = "embeddings.patch_embeddings.projection.weight"
TRANSFORMERS_RESNET_NAME = "embedder.embedder.convolution.weight"

# The beginnings of names outside of the layers.
_TOP = {
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.": "",
    "layernorm.": "norm.",
}
# Version 4's names of a layer's modules, then version 5's.
_LAYER = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.fc2",
}
_JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}
"""A layer of timm, and the layers whose rows it holds, in their order."""


def vit_from_transformers(state: State) -> State:
    """Return a ViT's tensors under the names of timm and of DINOv2's authors."""
    named = {_vit_name(name): value for name, value in state.items()}
    for name in list(named):
        block, dot, rest = name.rpartition("attn.q.")
        if dot:
            _join(named, block, "attn.qkv", rest)
        block, dot, rest = name.rpartition("mlp.gate.")
        if dot:
            _join(named, block, "mlp.fc1", rest)
    return named


def _vit_name(name: str) -> str:
    layer = re.fullmatch(r"(?:encoder\.)?layers?\.(\d+)\.(.+)", name)
    if layer is not None:
        for theirs, ours in _LAYER.items():
            if layer[2] == theirs or layer[2].startswith(f"{theirs}."):
                return f"blocks.{layer[1]}.{ours}{layer[2].removeprefix(theirs)}"
        return f"blocks.{layer[1]}.{layer[2]}"
    for theirs, ours in _TOP.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _join(named: State, block: str, whole: str, rest: str) -> None:
    """Concatenate the tensors of layers that timm joins; if one is missing, change nothing."""
    names = [f"{block}{part}.{rest}" for part in _JOINED[whole]]
    if all(name in named for name in names):
        parts = [named.pop(name) for name in names]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        named[f"{block}{whole}.{rest}"] = StoredTensor(shape, _JoinedTensor(parts))


class _JoinedTensor:
    """Reads several stored tensors as one, concatenated by rows; it can be pickled."""

    def __init__(self, parts: list[StoredTensor]) -> None:
        self.parts = parts

    def __call__(self) -> Tensor:
        return torch.cat([part.read() for part in self.parts])


def resnet_from_transformers(state: State) -> State:
    """Return a ResNet's tensors under torchvision's names."""
    return {_resnet_name(name): value for name, value in state.items()}


def _resnet_name(name: str) -> str:
    stem = re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(.+)", name)
    if stem is not None:
        return f"{'conv1' if stem[1] == 'convolution' else 'bn1'}.{stem[2]}"
    inner = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(shortcut|layer\.(\d+))\.(\w+)\.(.+)"
    match = re.fullmatch(inner, name)
    if match is None:
        return name
    block, is_conv = f"layer{int(match[1]) + 1}.{match[2]}", match[5] == "convolution"
    if match[3] == "shortcut":
        return f"{block}.downsample.{0 if is_conv else 1}.{match[6]}"
    return f"{block}.{'conv' if is_conv else 'bn'}{int(match[4]) + 1}.{match[6]}"
