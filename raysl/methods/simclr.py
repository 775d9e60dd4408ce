"""SimCLR.

T. Chen, S. Kornblith, M. Norouzi, G. Hinton: "A Simple Framework for Contrastive Learning of
Visual Representations", 2020, arXiv:2002.05709v3. Version 2 (a deeper head): T. Chen et al., "Big
Self-Supervised Models are Strong Semi-Supervised Learners", 2020, arXiv:2006.10029v2.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raysl.config.base import PositiveFloat, PositiveInt
from raysl.errors import ShapeError
from raysl.methods.base import LossOutput, Method, MethodConfig, Progress
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import gather_batch, rank_and_size
from raysl.nn.heads import projection_mlp


def nt_xent_loss(z0: Tensor, z1: Tensor, *, temperature: float) -> Tensor:
    r"""Normalised temperature-scaled cross entropy over the views of all ranks.

    .. math::
        \ell_{i,j} = -\log \frac{\exp(s_{i,j}/\tau)}{\sum_{k \ne i} \exp(s_{i,k}/\tau)}

    Here s is the cosine similarity, and the mean runs over both orders of each of this rank's N
    pairs. Negatives are the 2RN - 2 other embeddings of the R ranks.

    Args:
        z0: Projections of view 0, ``(N, D)``, any float dtype, not normalised.
        z1: Projections of view 1, same shape; row i comes from the same image as ``z0[i]``.
        temperature: Tau, > 0.

    Returns:
        Scalar float32 >= 0. Uniform embeddings give log(2RN - 1).

    Raises:
        ShapeError: If the two shapes differ or are not ``(N, D)``.

    Source: Eq. (1) and Algorithm 1. Similarities are float32, also under autocast.
    """
    logits, partner = _logits(z0, z1, temperature=temperature)
    return F.cross_entropy(logits, partner)


def _logits(z0: Tensor, z1: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the logits ``(2N, 2RN)`` of this rank's rows and the column of each one's partner."""
    if z0.ndim != 2 or z0.shape != z1.shape:
        raise ShapeError(f"z0 and z1 must both be (N, D); got {tuple(z0.shape)}, {tuple(z1.shape)}")
    n = z0.shape[0]
    with torch.autocast(z0.device.type, enabled=False):
        rows = F.normalize(torch.cat([z0.float(), z1.float()]), dim=1)  # (2N, D)
        keys = gather_batch(rows)  # (2RN, D): rank 0's views 0 and 1, rank 1's, ...
        logits = rows @ keys.T / temperature  # (2N, 2RN)
    rank, _ = rank_and_size()
    place = torch.arange(2 * n, device=z0.device)
    own = place + rank * 2 * n
    partner = (place + n) % (2 * n) + rank * 2 * n
    # The sum in Eq. (1) skips k = i.
    return logits.scatter(1, own[:, None], float("-inf")), partner


class SimCLRConfig(MethodConfig):
    """Settings of SimCLR."""

    name: Literal["simclr"] = "simclr"
    temperature: PositiveFloat = 0.1
    """Tau of Eq. (1): 0.1 for ImageNet at batch 4,096 (table 5), 0.5 for CIFAR-10 (B.9)."""
    projection_layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Linear layers of the head: 2 in version 1, 3 in version 2."""
    hidden_dim: PositiveInt | None = None
    """Width of the head's hidden layers; null takes the encoder's width, as in the paper."""
    projection_dim: PositiveInt = 128
    """Width of the head's output."""


class SimCLR(Method):
    """Two views of an image attract each other, all other images of the batch repel."""

    Config = SimCLRConfig

    def __init__(self, config: SimCLRConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.temperature = config.temperature
        self.backbone = backbone
        self.projector = projection_mlp(
            backbone.embed_dim,
            config.hidden_dim or backbone.embed_dim,
            config.projection_dim,
            num_layers=config.projection_layers,
        )

    @property
    def encoder(self) -> Backbone:
        """The backbone without the projection head."""
        return self.backbone

    def loss(self, views: Sequence[Tensor], progress: Progress) -> LossOutput:
        """Return NT-Xent of two views; batch norm sees both views together, as in Algorithm 1."""
        n = views[0].shape[0]
        features = self.backbone(torch.cat(list(views)))  # (2N, embed_dim)
        z0, z1 = self.projector(features).split(n)
        logits, partner = _logits(z0, z1, temperature=self.temperature)
        with torch.no_grad():
            found = (logits.argmax(dim=1) == partner).float().mean()
        loss = F.cross_entropy(logits, partner)
        return LossOutput(loss, features[:n].detach(), {"simclr/partner_top1": found})


METHOD = SimCLR
