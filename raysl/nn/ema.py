"""Update the exponential moving average of a module's parameters."""

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def ema_update_(target: nn.Module, online: nn.Module, *, momentum: float) -> None:
    """Set each parameter of ``target`` to momentum * target + (1 - momentum) * online.

    Buffers are unchanged: each network's batch norm keeps the statistics of its own passes.
    """
    averages = [parameter.data for parameter in target.parameters()]
    currents = [parameter.data for parameter in online.parameters()]
    get_ema_multi_avg_fn(momentum)(averages, currents, 0)
