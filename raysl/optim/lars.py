"""LARS: layer-wise adaptive rate scaling.

Y. You, I. Gitman, B. Ginsburg: "Large Batch Training of Convolutional Networks", 2017,
arXiv:1708.03888v3, with the details of SimCLR's authors' code (lars_optimizer.py).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    r"""SGD with momentum, with each layer's step scaled to the norm of its weights.

    .. math::
        g \leftarrow g + \lambda w, \quad
        r = \eta \, \|w\| / \|g\|, \quad
        v \leftarrow \mu v + \gamma r g, \quad
        w \leftarrow w - v

    The ratio r is 1 where a norm is zero, and in parameter groups with ``adapt=False`` (biases and
    batch norm, which also take no weight decay).

    Args:
        params: Parameters or groups; a group may set ``adapt`` and ``weight_decay``.
        lr: gamma, >= 0.
        momentum: mu, in [0, 1).
        weight_decay: lambda, >= 0.
        trust_coefficient: eta, > 0.

    Raises:
        ValueError: If a value is out of its range.

    Source: Algorithm 1.
    Departs: The norm of g includes the weight decay, as in SimCLR's authors' code; the paper
        divides by the sum of the two norms.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1 or trust_coefficient <= 0:
            raise ValueError(
                "LARS needs lr >= 0, 0 <= momentum < 1, weight_decay >= 0, trust_coefficient > 0; "
                f"got {lr}, {momentum}, {weight_decay}, {trust_coefficient}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; a closure, if given, recomputes the loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient = weight.grad
        assert gradient is not None
        if group["weight_decay"]:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        if group["adapt"]:
            weight_norm, gradient_norm = weight.norm(), gradient.norm()
            ratio = torch.where(
                (weight_norm > 0) & (gradient_norm > 0),
                group["trust_coefficient"] * weight_norm / gradient_norm,
                1.0,
            )
            gradient = gradient * ratio
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        # The learning rate is inside the momentum: changing it only affects new gradients.
        update = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient, alpha=group["lr"])
        weight.sub_(update)
