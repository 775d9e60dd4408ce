"""Prototypes: learnt directions that embeddings are compared with (DINO, appendix C)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.nn.precision import at_least_float32


class Prototypes(nn.Module):
    """Inner products with K directions.

    Computed in float32 also under autocast, because temperatures amplify rounding errors.
    Directions have length 1, or a learnt length that starts at 1.
    """

    def __init__(self, in_dim: int, num_prototypes: int, *, learn_length: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, in_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        # A matrix, because the authors' weight decay includes matrices and excludes vectors.
        self.length = nn.Parameter(torch.ones(num_prototypes, 1)) if learn_length else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_dim)`` to ``(N, K)``."""
        with torch.autocast(x.device.type, enabled=False):
            directions = F.normalize(self.weight, dim=1)
            if self.length is not None:
                directions = directions * self.length
            return F.linear(at_least_float32(x), directions)
