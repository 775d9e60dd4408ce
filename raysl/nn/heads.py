"""Heads that methods put on an encoder."""

from torch import nn


def projection_mlp(
    in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int = 2, batch_norm: bool = True
) -> nn.Sequential:
    """Build a perceptron of ``num_layers`` linear layers with ReLU in between.

    Args:
        in_dim: Features in.
        hidden_dim: Features of every hidden layer.
        out_dim: Features out.
        num_layers: Linear layers, > 0; 1 is a single linear map.
        batch_norm: Put batch norm after each linear layer, the last one too (SimCLR's authors'
            code; without its bias there, as the bias would only shift the origin).
    """
    layers: list[nn.Module] = []
    for layer in range(num_layers):
        last = layer == num_layers - 1
        width = out_dim if last else hidden_dim
        layers.append(nn.Linear(in_dim, width, bias=not batch_norm))
        if batch_norm:
            norm = nn.BatchNorm1d(width)
            if last:
                nn.init.zeros_(norm.bias)
                norm.bias.requires_grad_(False)
            layers.append(norm)
        if not last:
            layers.append(nn.ReLU(inplace=True))
        in_dim = width
    return nn.Sequential(*layers)
