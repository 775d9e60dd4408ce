"""Recognise fixed sine-cosine position embeddings, and the order of their features."""

import math
from typing import Literal

import torch

from raysl.encoder.stored import State
from raysl.nn.vit import sincos_positions

# Half precision rounds sines by up to 5e-4; learnt positions differ much more.
_TOLERANCE = 2e-3


def fixed_positions(state: State) -> Literal["mae", "moco_v3"] | None:
    """Return the project whose fixed positions a vision transformer has; None if they are learnt.

    The first half of the features encodes the column in MAE, and the row in MoCo v3. The reason is
    the grid: MoCo v3's vits.py builds it with ``torch.meshgrid``, whose first index is the row, and
    MAE's pos_embed.py with numpy's, whose first index is the column. Both have a zero vector for
    the class token.

    Args:
        state: An encoder under timm's names; ``pos_embed`` is ``(1, 1 + side**2, D)``.
    """
    if "pos_embed" not in state:
        return None
    stored = state["pos_embed"]
    if len(stored.shape) != 3 or stored.shape[0] != 1 or stored.shape[2] % 4:
        return None
    side, dim = math.isqrt(max(stored.shape[1] - 1, 0)), stored.shape[2]
    # For a single patch, both orders are the same.
    if side < 2 or stored.shape[1] != 1 + side**2:
        return None
    try:
        values = stored.read().float()
    except Exception:  # damaged in some way; loading the network will report it
        return None
    mae = sincos_positions(dim, side, side)
    moco_v3 = torch.cat([mae[..., dim // 2 :], mae[..., : dim // 2]], dim=-1)
    if torch.allclose(values, mae, rtol=0, atol=_TOLERANCE):
        return "mae"
    return "moco_v3" if torch.allclose(values, moco_v3, rtol=0, atol=_TOLERANCE) else None
