"""Heads that methods put on an encoder."""

from typing import Literal

from torch import nn

from raysl.errors import ConfigError


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


def count_layers(head: nn.Sequential) -> int:
    """Return the number of linear layers of a head."""
    return sum(isinstance(layer, nn.Linear) for layer in head)


def first_layers(head: nn.Sequential, num_layers: int) -> nn.Sequential:
    """Return the first linear layers of a head, each with its batch norm and nonlinearity.

    Args:
        head: What begins with a linear layer, such as :func:`projection_mlp`.
        num_layers: Linear layers to keep; 0 keeps nothing, all of them the whole head.

    Returns:
        The same modules, not copies of them.

    Raises:
        ConfigError: If the head has fewer.
    """
    starts = [place for place, layer in enumerate(head) if isinstance(layer, nn.Linear)]
    if not 0 <= num_layers <= len(starts):
        raise ConfigError(f"{num_layers} layers of a head that has {len(starts)}")
    return head[: [*starts, len(head)][num_layers]]
