"""Contrastive learning with a margin (DrLIM).

R. Hadsell, S. Chopra, Y. LeCun: "Dimensionality Reduction by Learning an Invariant Mapping", CVPR
2006 (not on arXiv).
"""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import Idle, PositiveFloat, PositiveInt
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import (
    Batch,
    LossOutput,
    MethodConfig,
    Progress,
    RunShape,
    SiameseMethod,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import gather_batch, gather_batch_no_grad, rank_and_size
from raysl.nn.heads import projection_mlp
from raysl.nn.precision import at_least_float32


def margin_loss(z0: Tensor, z1: Tensor, dissimilar: Tensor, *, margin: float) -> Tensor:
    r"""Attract similar pairs, and repel dissimilar ones up to a distance, the margin.

    .. math::
        L(Y, d) = (1 - Y) \tfrac{1}{2} d^2 + Y \tfrac{1}{2} \max(0, m - d)^2, \qquad
        d = \lVert z_0 - z_1 \rVert_2

    Args:
        z0: One embedding of each pair, ``(N, D)``, any float dtype, not normalised here.
        z1: The other embedding, same shape.
        dissimilar: Y, ``(N,)`` of 0 (similar) or 1 (dissimilar), any dtype.
        margin: m, > 0, in the units of the embeddings: dissimilar pairs that are further apart have
            no gradient.

    Returns:
        Scalar >= 0, the mean over pairs; float32, or float64 if given that. Pairs at distance 0
        give m^2 / 2 if dissimilar. The gradient of such a pair, which has no direction, is 0.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Eq. (4). Computed in float32 also under autocast.
    Departs: The mean over pairs, where the paper has their sum.
    """
    if z0.ndim != 2 or z0.shape != z1.shape or dissimilar.shape != z0.shape[:1]:
        raise ShapeError(
            "z0 and z1 must both be (N, D) and dissimilar (N,); got "
            f"{tuple(z0.shape)}, {tuple(z1.shape)}, {tuple(dissimilar.shape)}"
        )
    with torch.autocast(z0.device.type, enabled=False):
        return _losses(_distance(z0, z1), dissimilar, margin=margin).mean()


def _distance(z0: Tensor, z1: Tensor) -> Tensor:
    """Return Euclidean distances of the rows; torch defines this norm's gradient at 0 as 0."""
    distance: Tensor = torch.linalg.vector_norm(at_least_float32(z0) - at_least_float32(z1), dim=-1)
    return distance


def _losses(distance: Tensor, dissimilar: Tensor, *, margin: float) -> Tensor:
    """Return Eq. (4) of each pair."""
    y = dissimilar.to(distance.dtype)
    return ((1 - y) * distance.square() + y * (margin - distance).clamp_min(0).square()) / 2


class MarginConfig(MethodConfig):
    """Settings of the margin loss."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("hidden_dim",), {"projection_layers": (1,)}),)
    name: Literal["margin"] = "margin"
    margin: PositiveFloat = 1.0
    """m of Eq. (4), a distance: dissimilar pairs further apart have no loss. On the unit sphere at
    most 2; random directions are sqrt(2) apart."""
    normalize: bool = False
    """Put embeddings on the unit sphere. The paper does not: its distances are unbounded, and only
    the margin sets their scale."""
    pairs: Literal["views", "labels"] = "views"
    """Which of the drawn pairs are similar. views: only two views of one image. labels: also two
    images of one class (the paper's neighbours, sec. 2); an image of unknown class is only similar
    to itself. Needs a source with labels."""
    num_others: PositiveInt = 8
    """Number of other images of the global batch that each image is paired with, in addition to the
    pair of its two views. The loss is the mean over all pairs, so this also sets the weight of
    dissimilar pairs. The paper's digits have 5 similar partners, and all others are dissimilar."""
    projection_layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Number of linear layers of the head; 1 is the paper's, a last linear layer."""
    hidden_dim: PositiveInt | None = None
    """Width of the head's hidden layers; null takes the encoder's width."""
    projection_dim: PositiveInt = 128
    """Width of embeddings; 2 or 3 in the paper, which plots them."""

    @property
    def uses_labels(self) -> bool:
        """Whether labels tell which pairs are similar."""
        return self.pairs == "labels"

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return self.projection_layers

    def check(self, shape: RunShape) -> None:
        """Reject more partners than a batch has, and a margin that no pair can reach."""
        if self.num_others >= shape.global_batch_size:
            raise ConfigError(
                f"method.num_others={self.num_others}: an image has "
                f"{shape.global_batch_size - 1} others in train.global_batch_size="
                f"{shape.global_batch_size}; use at most that many"
            )
        if self.normalize and self.margin > 2:
            raise ConfigError(
                f"method.margin={self.margin}: embeddings on the unit sphere are at most 2 apart; "
                "use at most 2, or normalize: false"
            )


class Margin(SiameseMethod):
    """Attract two views of an image, and repel other images up to a margin."""

    Config = MarginConfig
    norms_views_together: ClassVar[bool] = True

    def __init__(self, config: MarginConfig, backbone: Backbone, data: TrainingSet) -> None:
        if config.pairs == "labels" and data.class_counts is None:
            raise ConfigError(
                "method.pairs=labels: data.source has no labels; use one that has, or pairs: views"
            )
        projector = projection_mlp(
            backbone.embed_dim,
            config.hidden_dim or backbone.embed_dim,
            config.projection_dim,
            num_layers=config.projection_layers,
            batch_norm=False,  # would fix the scale of distances, which the margin sets
        )
        last = projector[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.bias)  # distances do not depend on the origin
        last.bias.requires_grad_(False)
        super().__init__(config, backbone, data, projector=projector)
        self.config = config

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Return the margin loss of each image with its other view and with other images."""
        features, *views = embeddings
        with torch.autocast(features.device.type, enabled=False):
            z0, z1 = (at_least_float32(z) for z in views)
            if self.config.normalize:
                z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
            all_z1 = gather_batch(z1)  # (RN, D)
            partner = _partners(
                len(z0), self.config.num_others, generator=progress.shared_generator()
            ).to(z0.device)  # (N, K)
            of_others = _distance(z0[:, None], all_z1[partner])  # (N, K)
            distance = torch.cat([_distance(z0, z1)[:, None], of_others], dim=1)  # (N, 1 + K)
            is_similar = torch.zeros_like(distance[:, :1], dtype=torch.bool)
            dissimilar = torch.cat([is_similar, self._is_dissimilar(batch, partner)], dim=1)
            loss = _losses(distance, dissimilar, margin=self.config.margin).mean()
        health = _health(distance.detach(), dissimilar, self.config) if progress.is_logged else {}
        return LossOutput(loss, features, health)

    def _is_dissimilar(self, batch: Batch, partner: Tensor) -> Tensor:
        """Return whether each image and its partners are a dissimilar pair, ``(N, K)``."""
        if self.config.pairs == "views" or batch.labels is None:
            return torch.ones_like(partner, dtype=torch.bool)
        label = batch.labels[:, None]
        return (label != gather_batch_no_grad(batch.labels)[partner]) | (label < 0)


def _partners(n: int, num_others: int, *, generator: torch.Generator) -> Tensor:
    """Draw distinct partners, from all ranks' batch, for each image of this rank.

    All images are arranged in a random circle, and an image's partners are the ones that follow it.
    So no partner is the image itself or repeated, and the draw does not depend on the number of
    ranks.

    Args:
        n: N, number of images of this rank.
        num_others: Number of partners of an image; fewer if the batch is smaller.
        generator: A generator in the same state on all ranks.

    Returns:
        ``(N, K)`` rows of the batch of all ranks.
    """
    rank, size = rank_and_size()
    total = size * n
    circle = torch.randperm(total, generator=generator)
    position = torch.empty_like(circle)
    position[circle] = torch.arange(total)
    mine = position[rank * n : (rank + 1) * n]
    steps = torch.arange(1, min(num_others, total - 1) + 1)
    return circle[(mine[:, None] + steps) % total]


def _health(distance: Tensor, dissimilar: Tensor, config: MarginConfig) -> dict[str, Tensor]:
    """Return the mean distance of both kinds of pairs, and the share of dissimilar ones too close.

    Both means near 0, and a share of 1, are a collapse.
    """
    dissimilar_weight = dissimilar.to(distance.dtype)
    similar_weight = 1 - dissimilar_weight
    num_dissimilar = dissimilar_weight.sum().clamp_min(1)
    return {
        "margin/similar_distance": (distance * similar_weight).sum() / similar_weight.sum(),
        "margin/dissimilar_distance": (distance * dissimilar_weight).sum() / num_dissimilar,
        "margin/inside_share": ((distance < config.margin) * dissimilar_weight).sum()
        / num_dissimilar,
    }


METHOD = Margin
