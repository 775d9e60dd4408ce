"""The precision of losses and similarities, where autocast has left less."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor as float32, or as the float64 that it is."""
    return x if x.dtype == torch.float64 else x.float()
