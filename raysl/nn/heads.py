"""Heads that methods put on an encoder."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from raysl.errors import ConfigError, DataError

_MOST_FEATURES = 1 << 20  # of a layer in a file: more is damage, and would take all memory


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


def describe_layers(head: nn.Sequential) -> list[dict[str, Any]]:
    """Return what a head is made of as plain data, from which :func:`build_layers` makes it again.

    Raises:
        ConfigError: If it has a layer of another kind than linear, batch norm, ReLU and GELU.
    """
    found: list[dict[str, Any]] = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            sizes = {"inputs": layer.in_features, "outputs": layer.out_features}
            found.append({"layer": "linear", **sizes, "bias": layer.bias is not None})
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            known = {"outputs": layer.num_features, "affine": layer.affine, "eps": layer.eps}
            found.append({"layer": "batch_norm", **known})
        elif isinstance(layer, nn.ReLU):
            found.append({"layer": "relu"})
        elif isinstance(layer, nn.GELU):
            found.append({"layer": "gelu"})
        else:
            raise ConfigError(
                f"a head with a {type(layer).__name__} cannot be written to a file; use linear "
                f"layers, batch norm, ReLU and GELU"
            )
    return found


def build_layers(
    layers: Sequence[Mapping[str, Any]], *, inputs: int | None = None
) -> nn.Sequential:
    """Make a head of what :func:`describe_layers` returned, with random weights.

    Args:
        layers: Its layers.
        inputs: Features that it is to take; None leaves that to its first layer.

    Raises:
        DataError: If the data describe no head, or one that takes other features.
    """
    try:
        head = nn.Sequential(*(_build_layer(layer) for layer in layers))
        _check_widths(head, inputs)
        return head
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"its header describes no head that this version knows: {error}") from None


def _build_layer(layer: Mapping[str, Any]) -> nn.Module:
    kind = layer["layer"]
    if kind == "linear":
        return nn.Linear(_width(layer["inputs"]), _width(layer["outputs"]), bias=layer["bias"])
    if kind == "batch_norm":
        eps = float(layer["eps"])
        return nn.BatchNorm1d(_width(layer["outputs"]), affine=layer["affine"], eps=eps)
    if kind in ("relu", "gelu"):
        return nn.ReLU(inplace=True) if kind == "relu" else nn.GELU()
    raise ValueError(f"a layer {kind!r}")


def _check_widths(head: nn.Sequential, inputs: int | None) -> None:
    """Refuse a layer that cannot take what comes before it."""
    for layer in head:
        takes = gives = inputs
        if isinstance(layer, nn.Linear):
            takes, gives = layer.in_features, layer.out_features
        elif isinstance(layer, nn.BatchNorm1d):
            takes = gives = layer.num_features
        if inputs is not None and takes != inputs:
            raise ValueError(f"a layer of {takes} features after {inputs}")
        inputs = gives


def _width(value: Any) -> int:
    if not isinstance(value, int) or not 0 < value <= _MOST_FEATURES:
        raise ValueError(f"{value!r} features")
    return value
