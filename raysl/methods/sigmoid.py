"""SigLIP's sigmoid loss, on two views of an image.

X. Zhai, B. Mustafa, A. Kolesnikov, L. Beyer: "Sigmoid Loss for Language Image Pre-Training", 2023,
arXiv:2303.15343v4.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import Idle, PositiveFloat, PositiveInt
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
from raysl.nn.collectives import gather_batch, rank_and_size
from raysl.nn.contrast import Contrast, pairwise_sigmoid, unit_rows
from raysl.nn.geometry import alignment, uniformity
from raysl.nn.heads import projection_mlp


def sigmoid_loss(
    z0: Tensor, z1: Tensor, *, temperature: Tensor | float, bias: Tensor | float
) -> Tensor:
    r"""Compute the binary cross entropy of all pairs of a view 0 and a view 1, over all ranks.

    .. math::
        L = -\frac{1}{N} \sum_i \sum_j \log \frac{1}{1 + \exp(z_{ij}(-t\, x_i \cdot y_j - b))}

    Here x and y are the embeddings of views 0 and 1 on the unit sphere, z is 1 if i = j and -1
    otherwise, j runs over the RN images of the R ranks, and t = 1 / temperature.

    Args:
        z0: Projections of view 0, ``(N, D)``, any float dtype, not normalised.
        z1: Projections of view 1, same shape; row i comes from the same image as ``z0[i]``.
        temperature: > 0, divides similarities, as elsewhere; SigLIP's t multiplies. A scalar tensor
            gets a gradient.
        bias: b, added to all logits. A scalar tensor gets a gradient.

    Returns:
        Scalar float32 (float64 for such embeddings) >= 0. With bias 0, uniform embeddings at
        temperature T give log(1 + exp(-1/T)) + (RN - 1) log(1 + exp(1/T)).

    Raises:
        ShapeError: If the two shapes differ or are not ``(N, D)``.

    Source: Sec. 3.2 and Algorithm 1. Similarities are float32, also under autocast.
    Departs: The paper passes embeddings from device to device (sec. 3.3); here they are gathered,
    and pairs are computed in tiles: memory grows with RN, and no rank holds the N x RN logits.
    """
    return _sigmoid(z0, z1, temperature=temperature, bias=bias).loss


def _sigmoid(
    z0: Tensor, z1: Tensor, *, temperature: Tensor | float, bias: Tensor | float
) -> Contrast:
    if z0.ndim != 2 or z0.shape != z1.shape:
        raise ShapeError(f"z0 and z1 must both be (N, D); got {tuple(z0.shape)}, {tuple(z1.shape)}")
    rows, partners = unit_rows(z0), unit_rows(z1)
    n = len(rows)
    own = torch.arange(n, device=rows.device) + rank_and_size()[0] * n
    return pairwise_sigmoid(
        rows,
        partners,
        gather_batch(partners),  # (RN, D)
        scale=1 / torch.as_tensor(temperature, dtype=rows.dtype, device=rows.device),
        bias=torch.as_tensor(bias, dtype=rows.dtype, device=rows.device),
        excluded=own[:, None],
    )


class SigmoidConfig(MethodConfig):
    """Settings of the sigmoid loss."""

    compares_images: ClassVar[bool] = True
    idle: ClassVar[tuple[Idle, ...]] = (Idle(("hidden_dim",), {"projection_layers": (1,)}),)
    name: Literal["sigmoid"] = "sigmoid"
    initial_temperature: PositiveFloat = 0.1
    """Initial temperature, which is then learnt. The paper's t = 10 (sec. 3.2) is its inverse."""
    initial_bias: float = -10.0
    """Initial b, which is then learnt. Nearly all pairs are negative, so training from a bias of 0
    would start with large corrections to all of them (sec. 3.2)."""
    projection_layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Number of linear layers of the head; the paper's encoders have none, SimCLR two."""
    hidden_dim: PositiveInt | None = None
    """Width of the head's hidden layers; null takes the encoder's width."""
    projection_dim: PositiveInt = 128
    """Width of the head's output."""

    @property
    def norms_images(self) -> bool:
        """True: there is batch norm after the encoder."""
        return True

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return self.projection_layers


class Sigmoid(SiameseMethod):
    """Classify separately whether each pair of views comes from the same image.

    Departs: The paper's two towers see an image and its text; here one encoder and SimCLR's head
    see two views, with view 0 in the role of the image and view 1 of the text.
    """

    Config = SigmoidConfig
    norms_views_together: ClassVar[bool] = True

    def __init__(self, config: SigmoidConfig, backbone: Backbone, data: TrainingSet) -> None:
        projector = projection_mlp(
            backbone.embed_dim,
            config.hidden_dim or backbone.embed_dim,
            config.projection_dim,
            num_layers=config.projection_layers,
        )
        super().__init__(config, backbone, data, projector=projector)
        # t' of Algorithm 1: t = exp(t') stays above 0.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.initial_temperature)))
        self.bias = nn.Parameter(torch.tensor(config.initial_bias))

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Return the sigmoid loss at the learned temperature and bias."""
        features, z0, z1 = embeddings
        temperature = torch.exp(-self.log_scale)
        loss, partner_top1 = _sigmoid(z0, z1, temperature=temperature, bias=self.bias)
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        metrics = {
            "sigmoid/partner_top1": partner_top1,
            "sigmoid/temperature": temperature.detach(),
            "sigmoid/bias": self.bias.detach().clone(),
            "sigmoid/alignment": alignment(z0, z1),
            "sigmoid/uniformity": uniformity(z0),
        }
        return LossOutput(loss, features, metrics)


METHOD = Sigmoid
