"""Build, shorten, describe and rebuild the projection heads on an encoder."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from raysl.errors import ConfigError, DataError

# Limit for a layer read from a file: more means damage, and would take all memory.
_MOST_FEATURES = 1 << 20


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

    A linear layer followed by batch norm has no bias, which batch norm would cancel.

    Args:
        in_dim: Number of input features.
        hidden_dim: Number of features of every hidden layer.
        out_dim: Number of output features.
        num_layers: Number of linear layers, > 0; 1 is a single linear map.
        batch_norm: Add batch norm after each linear layer.
        last_norm: Norm after the last layer, with ``batch_norm``: ``scaled`` has a scale, but its
            bias stays zero, because it would only shift the origin (SimCLR's authors' code);
            ``plain`` has neither (SimSiam's and MoCo v3's); ``none`` omits it (BYOL's).
        last_bias: Whether the last linear layer has a bias, if no batch norm follows it.
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
        head: A head that starts with a linear layer, such as :func:`projection_mlp`.
        num_layers: Number of linear layers to keep, from 0 to all.

    Returns:
        The same modules, not copies of them.

    Raises:
        ConfigError: If the head has fewer.
    """
    starts = [index for index, layer in enumerate(head) if isinstance(layer, nn.Linear)]
    if not 0 <= num_layers <= len(starts):
        raise ConfigError(f"{num_layers} layers of a head that has {len(starts)}")
    return head[: [*starts, len(head)][num_layers]]


def describe_layers(head: nn.Sequential) -> list[dict[str, Any]]:
    """Describe a head's layers as plain data, from which :func:`build_layers` rebuilds it.

    Raises:
        ConfigError: If a layer is not linear, batch norm, ReLU or GELU.
    """
    layers: list[dict[str, Any]] = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            sizes = {"inputs": layer.in_features, "outputs": layer.out_features}
            layers.append({"layer": "linear", **sizes, "bias": layer.bias is not None})
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            options = {"outputs": layer.num_features, "affine": layer.affine, "eps": layer.eps}
            layers.append({"layer": "batch_norm", **options})
        elif isinstance(layer, nn.ReLU):
            layers.append({"layer": "relu"})
        elif isinstance(layer, nn.GELU):
            layers.append({"layer": "gelu"})
        else:
            raise ConfigError(
                f"a head with a {type(layer).__name__} cannot be written to a file; use linear "
                f"layers, batch norm, ReLU and GELU"
            )
    return layers


def build_layers(
    layers: Sequence[Mapping[str, Any]], *, inputs: int | None = None
) -> nn.Sequential:
    """Build a head from the result of :func:`describe_layers`, with random weights.

    Args:
        layers: The layers of the head, in order.
        inputs: Expected number of input features; None accepts any.

    Raises:
        DataError: If the data do not describe a head, or one for another number of features.
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
    """Reject a layer whose width does not match the one before it."""
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
