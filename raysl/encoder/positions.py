"""Recognise fixed sine-cosine positions among learnt ones, and the order of their features."""

import math
from typing import Literal

import torch

from raysl.encoder.stored import State
from raysl.nn.vit import sincos_positions

# Half precision keeps sines to 5e-4; learnt positions are much further away.
_CLOSE = 2e-3


def fixed_positions(state: State) -> Literal["mae", "moco_v3"] | None:
    """Return whose fixed positions a vision transformer has; None if they are learnt.

    In MAE's positions the first half of the features encodes the column, in MoCo v3's the row: its
    vits.py builds the grid with ``torch.meshgrid``, whose first index runs down the image; MAE's
    pos_embed.py uses numpy's, whose first index runs across. The class token's row is 0 in both.

    Args:
        state: An encoder under timm's names; ``pos_embed`` is ``(1, 1 + side**2, D)``.
    """
    if "pos_embed" not in state:
        return None
    stored = state["pos_embed"]
    if len(stored.shape) != 3 or stored.shape[0] != 1 or stored.shape[2] % 4:
        return None
    side, dim = math.isqrt(max(stored.shape[1] - 1, 0)), stored.shape[2]
    # A single patch has the same position in either order.
    if side < 2 or stored.shape[1] != 1 + side**2:
        return None
    try:
        values = stored.read().float()
    except Exception:  # damaged in some way; loading the network will report it
        return None
    of_mae = sincos_positions(dim, side, side)
    of_moco = torch.cat([of_mae[..., dim // 2 :], of_mae[..., : dim // 2]], dim=-1)
    if torch.allclose(values, of_mae, rtol=0, atol=_CLOSE):
        return "mae"
    return "moco_v3" if torch.allclose(values, of_moco, rtol=0, atol=_CLOSE) else None
