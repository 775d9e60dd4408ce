"""Barlow Twins.

J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny: "Barlow Twins: Self-Supervised Learning via
Redundancy Reduction", 2021, arXiv:2103.03230v3.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raysl.config.base import Idle, NonNegativeFloat, PositiveFloat, PositiveInt
from raysl.errors import ShapeError
from raysl.methods.base import (
    Batch,
    LossOutput,
    MethodConfig,
    Progress,
    SiameseMethod,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import rank_and_size, sum_over_ranks
from raysl.nn.geometry import off_diagonal
from raysl.nn.heads import projection_mlp
from raysl.nn.precision import at_least_float32

_EPSILON = 1e-5  # added to the variance, as in torch's batch norm, which the authors normalise with


def barlow_loss(z0: Tensor, z1: Tensor, *, redundancy: float) -> Tensor:
    r"""Compute the distance of the two views' cross-correlation matrix from the identity.

    .. math::
        L = \sum_i (1 - C_{ii})^2 + \lambda \sum_i \sum_{j \ne i} C_{ij}^2

    C_ij is the correlation, over the RN images of all ranks, of entry i in view 0 with entry j in
    view 1. Every rank returns the same loss.

    Args:
        z0: Embeddings of view 0, ``(N, D)``, any float dtype, not normalised.
        z1: Embeddings of view 1, same shape; row i comes from the same image as ``z0[i]``.
        redundancy: Lambda, >= 0.

    Returns:
        Scalar float32 (float64 if the embeddings are) >= 0. Independent views give about D + lambda
        D (D - 1) / RN, collapsed ones D.

    Raises:
        ShapeError: If the two shapes differ or are not ``(N, D)``, or there is only one image.

    Source: Eq. (1) and (2), and the authors' main.py: the embeddings are normalised as batch norm
    does (the variance is biased, 1e-5 is added to it), in float32, also under autocast.
    Departs: Mean and variance are those of all ranks' images; the authors synchronise theirs too.
    """
    return _distance_to_identity(_cross_correlation(z0, z1), redundancy=redundancy)


def _cross_correlation(z0: Tensor, z1: Tensor) -> Tensor:
    """Return C, ``(D, D)``: the only tensor of this size that ranks exchange."""
    if z0.ndim != 2 or z0.shape != z1.shape:
        raise ShapeError(f"z0 and z1 must both be (N, D); got {tuple(z0.shape)}, {tuple(z1.shape)}")
    n, d = z0.shape
    total = n * rank_and_size()[1]
    if total < 2:
        raise ShapeError(f"a correlation needs 2 images or more; z0 and z1 are {tuple(z0.shape)}")
    with torch.autocast(z0.device.type, enabled=False):
        z = torch.cat([z0, z1], dim=1)  # (N, 2D): ranks exchange both views' sums at once
        z = at_least_float32(z)
        z = z - sum_over_ranks(z.sum(dim=0)) / total
        variance = sum_over_ranks(z.square().sum(dim=0)) / total
        z = z * (variance + _EPSILON).rsqrt()
        return sum_over_ranks(z[:, :d].T @ (z[:, d:] / total))


def _distance_to_identity(correlation: Tensor, *, redundancy: float) -> Tensor:
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    return on_diagonal + redundancy * off_diagonal(correlation).square().sum()


class BarlowConfig(MethodConfig):
    """Settings of Barlow Twins."""

    compares_images: ClassVar[bool] = True
    idle: ClassVar[tuple[Idle, ...]] = (Idle(("hidden_dim",), {"projection_layers": (1,)}),)
    name: Literal["barlow"] = "barlow"
    redundancy: NonNegativeFloat = 0.0051
    """Lambda of Eq. (1): 0.005 in the paper (sec. 2.2), 0.0051 in the authors' main.py."""
    loss_scale: PositiveFloat = 1.0
    """Factor of the loss; 1 is the paper's. It matters where a step depends on the size of the
    gradient: for everything under SGD, for biases and norms under LARS, for weight decay under
    both. For the steps of the authors' code on R GPUs, use 1 / R; :class:`Barlow` explains why."""
    projection_layers: Annotated[int, Field(ge=1, le=8)] = 3
    """Linear layers of the projector; batch norm and ReLU follow all but the last."""
    hidden_dim: PositiveInt = 8192
    """Width of the projector's hidden layers."""
    projection_dim: PositiveInt = 8192
    """D, the width of the embeddings (fig. 4: larger is better). About four D x D matrices of
    float32 are in memory at once: 1 GiB at 8192, 64 MiB at 2048."""

    @property
    def norms_images(self) -> bool:
        """True with hidden layers: batch norm follows each layer but the last."""
        return self.projection_layers > 1

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return self.projection_layers


class Barlow(SiameseMethod):
    """Make each entry of an embedding agree between views and uncorrelated with other entries.

    Departs: The gradient is that of the loss of all images, whatever the number of workers. In the
        authors' main.py it is divided by R on R GPUs: each GPU adds up the correlations of all by
        an all-reduce that autograd does not see, so its gradient is the share of its own images,
        and data-parallel training takes the mean of the R shares. Their learning rates (for 256
        images 0.2 for weights, 0.0048 for biases and norms) and decay (1e-6, weights only) assume
        such a gradient; here method.loss_scale 1 / R with optim.base_lr 0.2 and
        bias_and_norm_lr_ratio 0.024 does the same. They had 16 GPUs (their README).
    """

    Config = BarlowConfig
    norms_views_together: ClassVar[bool] = False

    def __init__(self, config: BarlowConfig, backbone: Backbone, data: TrainingSet) -> None:
        projector = projection_mlp(
            backbone.embed_dim,
            config.hidden_dim,
            config.projection_dim,
            num_layers=config.projection_layers,
            last_norm="none",
            last_bias=False,  # the correlation does not depend on it
        )
        super().__init__(config, backbone, data, projector=projector)
        self.config = config

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Return the scaled loss, and as metrics the mean entries of both of its terms."""
        features, z0, z1 = embeddings
        correlation = _cross_correlation(z0, z1)
        distance = _distance_to_identity(correlation, redundancy=self.config.redundancy)
        loss = self.config.loss_scale * distance
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        detached = correlation.detach()
        d = len(detached)
        metrics = {
            "barlow/diagonal": detached.diagonal().mean(),
            "barlow/off_diagonal": off_diagonal(detached).abs().sum() / max(1, d * (d - 1)),
        }
        return LossOutput(loss, features, metrics)


METHOD = Barlow
