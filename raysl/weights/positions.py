"""Fixed sines and cosines among learnt positions, and whose order they have."""

import math
from typing import Literal

import torch

from raysl.nn.vit import sincos_positions
from raysl.weights.stored import State

# Half precision keeps sines to 5e-4; learnt positions are nowhere near.
_CLOSE = 2e-3


def fixed_positions(state: State) -> Literal["mae", "moco_v3"] | None:
    """Return whose fixed positions a vision transformer has, None if it has learnt ones.

    MAE's first half of the features tells the column, MoCo v3's the row: its vits.py lays its
    grid out by ``torch.meshgrid`` with the first index down the image, MAE's pos_embed.py by
    numpy's with the first index across. The class token's row is 0 in both.

    Args:
        state: An encoder under timm's names; ``pos_embed`` is ``(1, 1 + side**2, D)``.
    """
    if "pos_embed" not in state:
        return None
    stored = state["pos_embed"]
    if len(stored.shape) != 3 or stored.shape[0] != 1 or stored.shape[2] % 4:
        return None
    side, dim = math.isqrt(max(stored.shape[1] - 1, 0)), stored.shape[2]
    # One patch has the same position in either order.
    if side < 2 or stored.shape[1] != 1 + side**2:
        return None
    try:
        found = stored.read().float()
    except Exception:  # damaged in whatever way; who loads the network reads it again and says so
        return None
    of_mae = sincos_positions(dim, side, side)
    of_moco = torch.cat([of_mae[..., dim // 2 :], of_mae[..., : dim // 2]], dim=-1)
    if torch.allclose(found, of_mae, rtol=0, atol=_CLOSE):
        return "mae"
    return "moco_v3" if torch.allclose(found, of_moco, rtol=0, atol=_CLOSE) else None
