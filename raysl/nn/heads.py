"""Heads that methods put on an encoder."""

from typing import Literal

from torch import nn


def projection_mlp(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    *,
    num_layers: int = 2,
    batch_norm: bool = True,
    last_norm: Literal["scaled", "plain", "none"] = "scaled",
    last_bias: bool = True,
) -> nn.Sequential:
    """Build a perceptron of ``num_layers`` linear layers with ReLU in between.

    A linear layer that batch norm follows has no bias, which batch norm would take away again.

    Args:
        in_dim: Features in.
        hidden_dim: Features of every hidden layer.
        out_dim: Features out.
        num_layers: Linear layers, > 0; 1 is a single linear map.
        batch_norm: Put batch norm after each linear layer.
        last_norm: That of the last layer, if there is batch norm: ``scaled`` has a scale, but its
            bias, which would only shift the origin, stays zero (SimCLR's authors' code); ``plain``
            has neither (SimSiam's and MoCo v3's); ``none`` leaves it out (BYOL's).
        last_bias: Whether the last linear layer has a bias, where no batch norm follows it.
    """
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers.append(nn.Linear(in_dim, hidden_dim, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.ReLU(inplace=True))
        in_dim = hidden_dim
    if not batch_norm or last_norm == "none":
        layers.append(nn.Linear(in_dim, out_dim, bias=last_bias))
        return nn.Sequential(*layers)
    norm = nn.BatchNorm1d(out_dim, affine=last_norm == "scaled")
    if norm.affine:
        nn.init.zeros_(norm.bias)
        norm.bias.requires_grad_(False)
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim, bias=False), norm)
