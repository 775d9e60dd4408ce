"""BYOL.

J.-B. Grill, F. Strub, F. Altche, C. Tallec, P. H. Richemond, E. Buchatskaya, C. Doersch,
B. A. Pires, Z. D. Guo, M. G. Azar, B. Piot, K. Kavukcuoglu, R. Munos, M. Valko: "Bootstrap Your Own
Latent: A New Approach to Self-Supervised Learning", 2020, arXiv:2006.07733v3. The authors' code:
google-deepmind/deepmind-research, folder byol.
"""

import copy
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.config.base import PositiveInt, Probability
from raysl.errors import ShapeError
from raysl.methods.base import Batch, LossOutput, Method, MethodConfig, Progress, TrainingSet
from raysl.nn.backbones import Backbone
from raysl.nn.ema import ema_update_
from raysl.nn.geometry import alignment, uniformity
from raysl.nn.heads import projection_mlp
from raysl.nn.precision import at_least_float32
from raysl.nn.schedules import cosine


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Compute the mean squared distance of two directions, for one order of the views.

    .. math::
        \left\| \bar q_\theta(z_\theta) - \bar z'_\xi \right\|_2^2
            = 2 - 2 \, \frac{\langle q_\theta(z_\theta), z'_\xi \rangle}
                            {\| q_\theta(z_\theta) \|_2 \, \| z'_\xi \|_2}

    Args:
        prediction: The prediction from one view's online projection, ``(N, D)``, any float dtype,
            not normalised.
        target: The target network's projection of the other view, same shape, not normalised. It
            gets no gradient.

    Returns:
        Scalar in [0, 4], the mean over the N images; float32, or float64 for float64 predictions.

    Raises:
        ShapeError: If the two shapes differ or are not ``(N, D)``.

    Source: Eq. (2). Computed as a distance, not from the cosine, as in the authors' code
        (regression_loss), so that it is accurate near 0; in float32 also under autocast.
    """
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise ShapeError(
            f"prediction and target must both be (N, D); got {tuple(prediction.shape)}, "
            f"{tuple(target.shape)}"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        x = at_least_float32(prediction)
        distance = F.normalize(x, dim=1) - F.normalize(target.detach().to(x.dtype), dim=1)
        return distance.square().sum(dim=1).mean()


class BYOLConfig(MethodConfig):
    """Settings of BYOL."""

    name: Literal["byol"] = "byol"
    hidden_dim: PositiveInt = 4096
    """Width of the hidden layer of projector and predictor (sec. 3.3)."""
    projection_dim: PositiveInt = 256
    """Width of projections and predictions."""
    ema_momentum: Probability = 0.996
    """tau_base: share of the target network kept at the first step; less for shorter runs. The
    authors use 0.97 for 40 epochs of ImageNet at batch 4,096 (12,500 steps), 0.99 for 100 and 300,
    0.996 for 1,000 (310,000 steps)."""
    final_ema_momentum: Probability = 1.0
    """tau at the end of the run, approached along half a cosine (sec. 3.3)."""

    @property
    def norms_images(self) -> bool:
        """True: there is batch norm after the encoder."""
        return True

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return 2


class BYOL(Method):
    """An online network learns to predict its moving average's projection of the other view.

    The target's batch norm is in training mode, as in the authors' code: it uses the statistics of
    each batch of views, as the online network's does, and its own running statistics are never
    used.

    Departs: The target starts as a copy of the online network; the authors' code draws its weights
        anew and says that it makes no difference. Hidden layers have no bias, which batch norm
        would cancel. The last layers have none either, as in the authors' code.
    """

    Config = BYOLConfig
    loss_is_mean_over_images: ClassVar[bool] = True

    def __init__(self, config: BYOLConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        hidden, out = config.hidden_dim, config.projection_dim
        projector = projection_mlp(
            backbone.embed_dim, hidden, out, last_norm="none", last_bias=False
        )
        self.online = nn.Sequential(backbone, projector)
        self.predictor = projection_mlp(out, hidden, out, last_norm="none", last_bias=False)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @property
    def encoder(self) -> Backbone:
        """The backbone of the online network, as in the paper."""
        backbone = self.online[0]
        assert isinstance(backbone, Backbone)
        return backbone

    @property
    def projection_head(self) -> nn.Sequential:
        """The projector of the online network."""
        projector = self.online[1]
        assert isinstance(projector, nn.Sequential)
        return projector

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Return the summed loss of both orders of the views; batch norm is separate for each."""
        features = [self.online[0](view) for view in batch.views]
        z0, z1 = (self.online[1](feature) for feature in features)
        with torch.no_grad():
            target0, target1 = (self.target(view) for view in batch.views)
        loss = byol_loss(self.predictor(z0), target1) + byol_loss(self.predictor(z1), target0)
        if not progress.is_logged:
            return LossOutput(loss, features[0].detach(), {})
        metrics = {
            "byol/alignment": alignment(z0, z1),
            "byol/uniformity": uniformity(z0),
            "byol/ema_momentum": torch.full((), self._momentum(progress), device=loss.device),
        }
        return LossOutput(loss, features[0].detach(), metrics)

    def after_optimizer_step(self, progress: Progress) -> None:
        """Update the target network: xi becomes tau xi + (1 - tau) theta (Eq. (1))."""
        ema_update_(self.target, self.online, momentum=self._momentum(progress))

    def _momentum(self, progress: Progress) -> float:
        """Return tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2 at step k of K (sec. 3.3)."""
        return cosine(
            progress.step,
            progress.total_steps,
            start=self.config.ema_momentum,
            end=self.config.final_ema_momentum,
        )


METHOD = BYOL
