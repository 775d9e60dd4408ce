"""SimSiam.

X. Chen, K. He: "Exploring Simple Siamese Representation Learning", 2020, arXiv:2011.10566v1. The
authors' code: facebookresearch/simsiam.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import Idle, PositiveInt
from raysl.errors import ShapeError
from raysl.methods.base import Batch, LossOutput, Method, MethodConfig, Progress, TrainingSet
from raysl.nn.backbones import Backbone
from raysl.nn.geometry import alignment, feature_std
from raysl.nn.heads import projection_mlp
from raysl.nn.precision import at_least_float32


def simsiam_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    r"""Compute the negative cosine similarity, for one order of the views.

    .. math::
        D(p_1, z_2) = - \frac{p_1}{\|p_1\|_2} \cdot \frac{z_2}{\|z_2\|_2}

    Args:
        prediction: Predictions from one view, ``(N, D)``, any float dtype, not normalised.
        projection: Projections of the other view, same shape, not normalised. It gets no gradient;
            without this stop-gradient training collapses (sec. 4.1).

    Returns:
        Scalar in [-1, 1], the mean over the N images; float32, or float64 for float64 predictions.

    Raises:
        ShapeError: If the two shapes differ or are not ``(N, D)``.

    Source: Eq. (1) with the stop-gradient of Eq. (3). In float32 also under autocast.
    """
    if prediction.ndim != 2 or prediction.shape != projection.shape:
        raise ShapeError(
            f"prediction and projection must both be (N, D); got {tuple(prediction.shape)}, "
            f"{tuple(projection.shape)}"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        p = at_least_float32(prediction)
        p, z = F.normalize(p, dim=1), F.normalize(projection.detach().to(p.dtype), dim=1)
        return -(p * z).sum(dim=1).mean()


class SimSiamConfig(MethodConfig):
    """Settings of SimSiam."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("hidden_dim",), {"projection_layers": (1,)}),)
    name: Literal["simsiam"] = "simsiam"
    projection_layers: Annotated[int, Field(ge=1, le=8)] = 3
    """Linear layers of the projector: 3 for ImageNet (sec. 3), 2 for CIFAR-10 (appendix D)."""
    hidden_dim: PositiveInt = 2048
    """Width of the projector's hidden layers (sec. 3)."""
    projection_dim: PositiveInt = 2048
    """Width of projections and predictions."""
    predictor_hidden_dim: PositiveInt = 512
    """Width of the predictor's hidden layer: a bottleneck, a quarter of its ends (sec. 3)."""
    constant_predictor_lr: bool = True
    """Keep the predictor's learning rate at its peak while the others decay (table 1 (c); the
    authors' option --fix-pred-lr, used for their models)."""

    @property
    def norms_images(self) -> bool:
        """True: there is batch norm after the encoder."""
        return True

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return self.projection_layers


class SimSiam(Method):
    """A network learns to predict its own projection of the other view, with a stop-gradient.

    Departs: The hidden layers are hidden_dim wide, as the paper says (2,048); the authors' code
        takes the encoder's width, which is the same for ResNet-50. The projector's last batch norm
        has no scale and no bias, as in the authors' code; not stated in the paper.
    """

    Config = SimSiamConfig
    loss_is_mean_over_images: ClassVar[bool] = True

    def __init__(self, config: SimSiamConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        out = config.projection_dim
        self.backbone = backbone
        self.projector = projection_mlp(
            backbone.embed_dim,
            config.hidden_dim,
            out,
            num_layers=config.projection_layers,
            last_norm="plain",
        )
        self.predictor = projection_mlp(out, config.predictor_hidden_dim, out, last_norm="none")

    @property
    def encoder(self) -> Backbone:
        """The backbone without projector and predictor."""
        return self.backbone

    @property
    def projection_head(self) -> nn.Sequential:
        """The projector."""
        return self.projector

    @property
    def constant_lr_modules(self) -> Sequence[nn.Module]:
        """The predictor if its learning rate is constant, else nothing."""
        return (self.predictor,) if self.config.constant_predictor_lr else ()

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Return the mean of both orders of the views (Eq. (4)); batch norm is per view."""
        features = [self.backbone(view) for view in batch.views]
        z0, z1 = (self.projector(feature) for feature in features)
        p0, p1 = self.predictor(z0), self.predictor(z1)
        loss = (simsiam_loss(p0, z1) + simsiam_loss(p1, z0)) / 2
        if not progress.is_logged:
            return LossOutput(loss, features[0].detach(), {})
        metrics = {
            "simsiam/projection_std": feature_std(z0),
            "simsiam/alignment": alignment(z0, z1),
        }
        return LossOutput(loss, features[0].detach(), metrics)


METHOD = SimSiam
