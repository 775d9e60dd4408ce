"""VICReg.

A. Bardes, J. Ponce, Y. LeCun: "VICReg: Variance-Invariance-Covariance Regularization for
Self-Supervised Learning", 2021, arXiv:2105.04906v3.
"""

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from raysl.config.base import Idle, NonNegativeFloat, PositiveInt
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

_EPSILON = 1e-4  # under the root of the variance: sec. 4.2


def vicreg_loss(
    z0: Tensor, z1: Tensor, *, similarity: float, variance: float, covariance: float
) -> Tensor:
    r"""Compute the loss: equal views, varying entries, and no correlation between entries.

    .. math::
        L = \lambda \frac{1}{N D} \sum_i \|z_i - z'_i\|^2
            + \frac{\mu}{2} (v(Z) + v(Z')) + \nu (c(Z) + c(Z'))

        v(Z) = \frac{1}{D} \sum_j \max(0, 1 - \sqrt{C(Z)_{jj} + \epsilon}), \quad
        c(Z) = \frac{1}{D} \sum_{i \ne j} C(Z)_{ij}^2

    C(Z) is the covariance of the entries over the RN images of all ranks, divided by RN - 1. The
    first term is the mean over this rank's N images; the others are the same on every rank.

    Args:
        z0: Embeddings of view 0, ``(N, D)``, any float dtype, not normalised.
        z1: Embeddings of view 1, same shape; row i comes from the same image as ``z0[i]``.
        similarity: Lambda, >= 0.
        variance: Mu, >= 0.
        covariance: Nu, >= 0.

    Returns:
        Scalar float32 (float64 if the embeddings are) >= 0. Collapsed embeddings give
        0.99 times ``variance``.

    Raises:
        ShapeError: If the two shapes differ or are not ``(N, D)``, or there is only one image.

    Source: Eq. (1) to (6) and the authors' main_vicreg.py, in float32, also under autocast.
    Departs: Where paper and authors' code differ, the code is followed: it divides the first term
    by D as well (Eq. (5) does not, Algorithm 1 does), and halves the variance term (neither Eq. (6)
    nor Algorithm 1 does). Covariances are summed over ranks; the authors gather embeddings, which
    gives the same.
    """
    terms = _compute_terms(z0, z1)
    return similarity * terms.invariance + variance * terms.variance + covariance * terms.covariance


class _Terms(NamedTuple):
    """The three terms without their weights, scalars, and a metric."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor
    std: Tensor  # mean standard deviation of the entries, over both views; detached


def _compute_terms(z0: Tensor, z1: Tensor) -> _Terms:
    if z0.ndim != 2 or z0.shape != z1.shape:
        raise ShapeError(f"z0 and z1 must both be (N, D); got {tuple(z0.shape)}, {tuple(z1.shape)}")
    if z0.shape[0] * rank_and_size()[1] < 2:
        raise ShapeError(f"a covariance needs 2 images or more; z0 and z1 are {tuple(z0.shape)}")
    with torch.autocast(z0.device.type, enabled=False):
        z0, z1 = (at_least_float32(z) for z in (z0, z1))
        matrices = [_covariance(z) for z in (z0, z1)]
        std0, std1 = ((matrix.diagonal() + _EPSILON).sqrt() for matrix in matrices)
        off0, off1 = (off_diagonal(matrix).square().sum() / len(matrix) for matrix in matrices)
        return _Terms(
            F.mse_loss(z0, z1),
            (F.relu(1 - std0).mean() + F.relu(1 - std1).mean()) / 2,
            off0 + off1,
            (std0.detach().mean() + std1.detach().mean()) / 2,
        )


def _covariance(z: Tensor) -> Tensor:
    """Return the covariance of the entries over all ranks' images, ``(D, D)``."""
    total = len(z) * rank_and_size()[1]
    z = z - sum_over_ranks(z.sum(dim=0)) / total
    return sum_over_ranks(z.T @ (z / (total - 1)))


class VICRegConfig(MethodConfig):
    """Settings of VICReg."""

    compares_images: ClassVar[bool] = True
    idle: ClassVar[tuple[Idle, ...]] = (Idle(("hidden_dim",), {"projection_layers": (1,)}),)
    name: Literal["vicreg"] = "vicreg"
    similarity: NonNegativeFloat = 25.0
    """Lambda of Eq. (6), weight of the views' squared distance (sec. 4.2)."""
    variance: NonNegativeFloat = 25.0
    """Mu, weight of the hinge that keeps every entry's standard deviation above 1."""
    covariance: NonNegativeFloat = 1.0
    """Nu, weight of the squared covariances between entries."""
    projection_layers: Annotated[int, Field(ge=1, le=8)] = 3
    """Linear layers of the expander; batch norm and ReLU follow all but the last."""
    hidden_dim: PositiveInt = 8192
    """Width of the expander's hidden layers."""
    projection_dim: PositiveInt = 8192
    """D, the width of the embeddings. About five D x D matrices of float32 are held at once,
    because each view has a covariance: 1.25 GiB at 8192, 80 MiB at 2048."""

    @property
    def norms_images(self) -> bool:
        """True with hidden layers: batch norm follows each layer but the last."""
        return self.projection_layers > 1

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return self.projection_layers


class VICReg(SiameseMethod):
    """Give two views of an image the same embedding, with varying, uncorrelated entries.

    The projector is the paper's expander.
    """

    Config = VICRegConfig
    norms_views_together: ClassVar[bool] = False

    def __init__(self, config: VICRegConfig, backbone: Backbone, data: TrainingSet) -> None:
        projector = projection_mlp(
            backbone.embed_dim,
            config.hidden_dim,
            config.projection_dim,
            num_layers=config.projection_layers,
            last_norm="none",
            last_bias=False,  # no term depends on it
        )
        super().__init__(config, backbone, data, projector=projector)
        self.config = config

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Return the weighted sum of the three terms, and the terms."""
        features, z0, z1 = embeddings
        terms, config = _compute_terms(z0, z1), self.config
        loss = (
            config.similarity * terms.invariance
            + config.variance * terms.variance
            + config.covariance * terms.covariance
        )
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        metrics = {
            "vicreg/invariance": terms.invariance.detach(),
            "vicreg/std": terms.std,
            "vicreg/covariance": terms.covariance.detach(),
        }
        return LossOutput(loss, features, metrics)


METHOD = VICReg
