"""Convert DINOv2 from its authors' names to timm's.

Oquab et al. 2023, DINOv2, arXiv:2304.07193v2; Darcet et al. 2023, Vision Transformers Need
Registers, arXiv:2309.16588v2. Source: dinov2/models/vision_transformer.py and layers/swiglu_ffn.py.
"""

import re
from functools import partial

from torch import Tensor

from raysl.encoder.stored import State, StoredTensor

LAYER_SCALE_NAME = "blocks.0.ls1.gamma"
"""timm's name of a tensor that only networks with layer scales have, such as DINOv2."""


def is_dinov2(state: State) -> bool:
    """Return whether a network has layer scales, under the names of timm or DINOv2."""
    return LAYER_SCALE_NAME in state or "blocks.0.0.ls1.gamma" in state


def dinov2_to_timm(state: State) -> State:
    """Return the tensors under timm's names.

    With registers, timm's position embeddings are those of the patches only; that of the class
    token is added to the token.
    """
    named = {_name(name): value for name, value in state.items() if name != "mask_token"}
    token, positions = named.get("cls_token"), named.get("pos_embed")
    if "register_tokens" in named and token is not None and positions is not None:
        one, count, dim = positions.shape
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = StoredTensor(
            token.shape, lambda: token.read() + positions.read()[:, :1]
        )
        named["pos_embed"] = StoredTensor(
            (one, count - 1, dim), partial(_patch_positions, positions)
        )
    return named


def _patch_positions(positions: StoredTensor) -> Tensor:
    return positions.read()[:, 1:].clone()


def _name(name: str) -> str:
    # In chunks, a block's number in the whole network follows the number of its chunk.
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
