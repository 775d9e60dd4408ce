"""MoCo v3.

X. Chen, S. Xie, K. He: "An Empirical Study of Training Self-Supervised Vision Transformers", 2021,
arXiv:2104.02057v4. The authors' code: facebookresearch/moco-v3.
"""

import copy
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import PositiveFloat, PositiveInt, Probability
from raysl.errors import ShapeError
from raysl.methods.base import (
    Batch,
    EmbeddingMethod,
    LossOutput,
    MethodConfig,
    Progress,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import gather_batch_no_grad, rank_and_size
from raysl.nn.contrast import Contrast, contrast, unit_rows
from raysl.nn.ema import ema_update_
from raysl.nn.geometry import alignment
from raysl.nn.heads import projection_mlp
from raysl.nn.schedules import cosine
from raysl.nn.vit import VisionTransformer


def moco_v3_loss(query: Tensor, key: Tensor, *, temperature: float) -> Tensor:
    r"""Compute InfoNCE over the keys of all ranks, times 2 tau, for one order of the views.

    .. math::
        L_q = -2 \tau \log \frac{\exp(q \cdot k^+/\tau)}
                                {\exp(q \cdot k^+/\tau) + \sum_{k^-} \exp(q \cdot k^-/\tau)}

    Args:
        query: Queries of one view, ``(N, D)``, any float dtype, not normalised.
        key: Keys of the other view, same shape on every rank, not normalised; row i comes from the
            same image as ``query[i]``. It gets no gradient.
        temperature: Tau, > 0.

    Returns:
        Scalar >= 0, the mean over this rank's N queries; float32, or float64 for float64 queries.
        Uniform embeddings on R ranks give 2 tau log(RN).

    Raises:
        ShapeError: If the two shapes differ or are not ``(N, D)``.

    Source: Eq. (1) and Algorithm 1, whose loss is scaled by 2 tau. In float32 also under autocast.
    """
    return _compare(query, key, temperature=temperature).loss * (2 * temperature)


def _compare(query: Tensor, key: Tensor, *, temperature: float) -> Contrast:
    """Return InfoNCE without the factor 2 tau, and how often a query's own key is the nearest."""
    if query.ndim != 2 or query.shape != key.shape:
        raise ShapeError(
            f"query and key must both be (N, D); got {tuple(query.shape)}, {tuple(key.shape)}"
        )
    q = unit_rows(query)
    k = unit_rows(key.detach()).to(q.dtype)
    rank, _ = rank_and_size()
    own = torch.arange(len(q), device=q.device)[:, None] + rank * len(q)  # (N, 1)
    return contrast(q, k, gather_batch_no_grad(k), temperature=temperature, excluded=own)


class MoCoV3Config(MethodConfig):
    """Settings of MoCo v3."""

    compares_images: ClassVar[bool] = True
    name: Literal["moco_v3"] = "moco_v3"
    temperature: PositiveFloat = 0.2
    """Tau: 0.2 for vision transformers, 1.0 for ResNet-50 (the authors' CONFIG.md)."""
    projection_layers: Annotated[int, Field(ge=1, le=8)] | None = None
    """Number of linear layers of the projector; null takes 3 for a vision transformer and 2 for
    others, as in the authors' code."""
    hidden_dim: PositiveInt = 4096
    """Width of the hidden layers of projector and predictor."""
    projection_dim: PositiveInt = 256
    """Width of queries and keys."""
    ema_momentum: Probability = 0.99
    """m: share of the key encoder kept at the first step; 0.996 for 1,000 epochs of ImageNet with
    ResNet-50 (the authors' CONFIG.md)."""
    final_ema_momentum: Probability = 1.0
    """m at the end of the run, approached along half a cosine."""
    freeze_patch_projection: bool = True
    """Freeze a vision transformer's patch projection at its initialisation, for stable training
    (sec. 4.2). Nothing is frozen in other backbones."""

    @property
    def norms_images(self) -> bool:
        """True: there is batch norm after the encoder."""
        return True

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return self.projection_layers or (3 if is_vit else 2)


class MoCoV3(EmbeddingMethod):
    """A query encoder learns to find its key among the keys of all images of the batch.

    The key encoder is its moving average, without the predictor, and with batch norm in training
    mode. The paper and the authors' code take batch norm over all workers: backbone.batch_norm
    sync.

    Departs: Whether the predictor ends in batch norm follows the backbone, as in the authors' code
        (a vision transformer's does, a ResNet's does not), not the paper, which describes one
        design. A transformer's weights and positions are initialised as configured; theirs are
        backbone.init moco_v3 and backbone.positions sincos. Their AdamW also decays biases and
        norms: optim.decay_bias_and_norm.
    """

    Config = MoCoV3Config

    def __init__(self, config: MoCoV3Config, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        hidden, out = config.hidden_dim, config.projection_dim
        net = backbone.net
        is_vit = isinstance(net, VisionTransformer)
        if isinstance(net, VisionTransformer) and config.freeze_patch_projection:
            net.patch_embed.requires_grad_(False)
        projector = projection_mlp(
            backbone.embed_dim,
            hidden,
            out,
            num_layers=config.projection_head_layers(is_vit=is_vit),
            last_norm="plain",
        )
        self.query_encoder = nn.Sequential(backbone, projector)
        self.predictor = projection_mlp(
            out, hidden, out, last_norm="plain" if is_vit else "none", last_bias=False
        )
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)

    @property
    def encoder(self) -> Backbone:
        """The backbone of the query encoder, as in the paper."""
        backbone = self.query_encoder[0]
        assert isinstance(backbone, Backbone)
        return backbone

    @property
    def projection_head(self) -> nn.Sequential:
        """The projector of the query encoder."""
        projector = self.query_encoder[1]
        assert isinstance(projector, nn.Sequential)
        return projector

    def embeddings(self, batch: Batch, progress: Progress) -> tuple[Tensor, ...]:
        """Return features of view 0, queries of both views, and keys of both."""
        features = [self.query_encoder[0](view) for view in batch.views]
        queries = [self.predictor(self.query_encoder[1](feature)) for feature in features]
        with torch.no_grad():
            keys = [self.key_encoder(view) for view in batch.views]
        return features[0].detach(), *queries, *keys

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Return the loss of both orders of the views, added (Algorithm 1)."""
        features, q0, q1, k0, k1 = embeddings
        temperature = self.config.temperature
        contrasts = [_compare(q, k, temperature=temperature) for q, k in ((q0, k1), (q1, k0))]
        loss = (contrasts[0].loss + contrasts[1].loss) * (2 * temperature)
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        metrics = {
            "moco_v3/partner_top1": torch.stack([each.partner_top1 for each in contrasts]).mean(),
            "moco_v3/alignment": alignment(q0, k1),
            "moco_v3/ema_momentum": torch.full((), self._momentum(progress), device=q0.device),
        }
        return LossOutput(loss, features, metrics)

    def after_optimizer_step(self, progress: Progress) -> None:
        """Update the key encoder: theta_k becomes m theta_k + (1 - m) theta_q."""
        ema_update_(self.key_encoder, self.query_encoder, momentum=self._momentum(progress))

    def _momentum(self, progress: Progress) -> float:
        """Return m of the update that follows this step.

        The authors' code updates the key encoder at the start of a step, before the keys are
        computed; that equals the end of the previous step, with the momentum of the next one.
        """
        return cosine(
            progress.step + 1,
            progress.total_steps,
            start=self.config.ema_momentum,
            end=self.config.final_ema_momentum,
        )


METHOD = MoCoV3
