"""SwAV.

M. Caron, I. Misra, J. Mairal, P. Goyal, P. Bojanowski, A. Joulin: "Unsupervised Learning of Visual
Features by Contrasting Cluster Assignments", 2020, arXiv:2006.09882v5.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import Duration, Idle, PositiveFloat, PositiveInt
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import (
    Batch,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    RunShape,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import gather_batch_no_grad, mean_over_ranks, rank_and_size
from raysl.nn.heads import projection_mlp
from raysl.nn.precision import at_least_float32

_NUM_LARGE = 2  # views whose codes the others predict


def swav_loss(scores: Sequence[Tensor], codes: Sequence[Tensor], *, temperature: float) -> Tensor:
    r"""Compute the cross entropy of each view's prediction with the codes of the other views.

    .. math::
        L = \frac{1}{C (V - 1)} \sum_{i=1}^{C} \sum_{v \ne i} \ell(z_v, q_i), \quad
        \ell(z_v, q_i) = -\frac{1}{N} \sum_n \sum_k q_{ink} \log \mathrm{softmax}(s_{vn} / \tau)_k

    Args:
        scores: Cosines of the V views' features with the K prototypes, each ``(N, K)``, any float
            dtype; views with codes come first.
        codes: Codes of the first C views, each ``(N, K)`` with rows that sum to 1, 0 < C <= V.
        temperature: Tau, > 0.

    Returns:
        Scalar float32 (float64 if the scores are) >= 0, the mean over this rank's images. Equal
        scores for all prototypes give log K.

    Raises:
        ShapeError: If shapes differ, or there are fewer than 2 views or no codes.

    Source: Eq. (1), (2) and (6), averaged as in the authors' main_swav.py; float32, also under
    autocast.
    """
    if len(scores) < 2 or not 0 < len(codes) <= len(scores):
        raise ShapeError(
            f"scores of 2 views or more and codes of at most as many; got {len(scores)} and "
            f"{len(codes)}"
        )
    shapes = {tuple(each.shape) for each in (*scores, *codes)}
    if len(shapes) > 1 or scores[0].ndim != 2:
        raise ShapeError(f"scores and codes must all be (N, K); got {sorted(shapes)}")
    with torch.autocast(scores[0].device.type, enabled=False):
        total = at_least_float32(scores[0]).new_zeros(())
        for v, score in enumerate(scores):
            others = [code for i, code in enumerate(codes) if i != v]
            if others:
                log_prediction = F.log_softmax(at_least_float32(score) / temperature, dim=1)
                total = total - (torch.stack(others).sum(dim=0) * log_prediction).sum(dim=1).mean()
        return total / (len(codes) * (len(scores) - 1))


@torch.no_grad()
def sinkhorn_codes(
    scores: Tensor, *, epsilon: float, iterations: int, queue_scores: Tensor | None = None
) -> Tensor:
    r"""Assign images to prototypes, softly and in equal shares.

    .. math::
        Q^* = \mathrm{Diag}(u) \exp(S / \epsilon) \mathrm{Diag}(v)

    u and v are computed alternately: each prototype's weights over the images of all ranks (and of
    the queue) are normalised to equal sums, then each image's over the prototypes.

    Args:
        scores: ``(N, K)``, any float dtype.
        epsilon: Weight of the entropy, > 0: the smaller, the harder the codes.
        iterations: Number of iterations, >= 0; 0 gives softmax(S / epsilon).
        queue_scores: Scores of features of earlier steps, ``(L, K)``, the same on every rank.

    Returns:
        Codes of the N images, ``(N, K)`` float32 (float64 if the scores are), rows that sum to 1,
        without gradient.

    Source: Eq. (3) to (5) and the authors' distributed_sinkhorn; float32, also under autocast.
    Departs: Computed in logarithms, so that no epsilon makes it overflow. The queue is not split
    over ranks, so that it does not depend on their number.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_codes = at_least_float32(scores) / epsilon
        log_queue = None if queue_scores is None else at_least_float32(queue_scores) / epsilon
        for _ in range(iterations):
            rank_totals = log_codes.logsumexp(dim=0, keepdim=True)  # (1, K)
            prototype_totals = gather_batch_no_grad(rank_totals).logsumexp(dim=0)  # (K)
            if log_queue is not None:
                prototype_totals = torch.logaddexp(prototype_totals, log_queue.logsumexp(dim=0))
                log_queue = F.log_softmax(log_queue - prototype_totals, dim=1)
            log_codes = F.log_softmax(log_codes - prototype_totals, dim=1)
        return log_codes.softmax(dim=1)


class SwAVConfig(MethodConfig):
    """Settings of SwAV."""

    takes_more_views: ClassVar[bool] = True
    compares_images: ClassVar[bool] = True
    beginnings: ClassVar[tuple[str, ...]] = ("frozen",)
    starts: ClassVar[Mapping[str, str]] = MappingProxyType({"queue_start": "queue_length"})
    idle: ClassVar[tuple[Idle, ...]] = (Idle(("queue_start",), {"queue_length": (None,)}),)
    name: Literal["swav"] = "swav"
    temperature: PositiveFloat = 0.1
    """Tau of Eq. (2)."""
    epsilon: PositiveFloat = 0.05
    """Epsilon of Eq. (3)."""
    sinkhorn_iterations: Annotated[int, Field(ge=0, le=1000)] = 3
    """Number of Sinkhorn-Knopp iterations (sec. 3.1)."""
    num_prototypes: PositiveInt = 3000
    """K: 3000 for the 1,000 classes of ImageNet; lightly's benchmark has 512 for CIFAR-10."""
    hidden_dim: PositiveInt = 2048
    """Width of the projector's hidden layer."""
    projection_dim: PositiveInt = 128
    """Width of the features and the prototypes."""
    frozen: Duration = Duration(epochs=1.0)
    """How long to freeze the prototypes at the start: one epoch in the authors' scripts."""
    queue_length: PositiveInt | None = None
    """Number of stored features of earlier images, for each large view, that take part in the
    assignment, for batches that are small relative to the number of prototypes: 3840 for 256 images
    and 3000 prototypes in the authors' swav_200ep_bs256_pretrain.sh; null has none. Each rank holds
    all of it, 4 MB there, and its scores in a step, about 50 MB per copy."""
    queue_start: Duration = Duration(epochs=15.0)
    """When the queue starts to fill; it is used once it is full."""

    @property
    def norms_images(self) -> bool:
        """True: there is batch norm after the encoder."""
        return True

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return 2

    def check(self, shape: RunShape) -> None:
        """Reject large views that are not the first two, and a queue shorter than the batch."""
        sizes = shape.view_sizes_px
        if max(sizes[_NUM_LARGE:], default=0) > min(sizes[:_NUM_LARGE]):
            raise ConfigError(
                f"method swav takes codes of the first {_NUM_LARGE} views, so no other may be "
                f"larger; data.views makes {list(sizes)} px"
            )
        if self.queue_length is not None and self.queue_length < shape.global_batch_size:
            raise ConfigError(
                f"method.queue_length={self.queue_length} is shorter than the "
                f"{shape.global_batch_size} images of one step; use at least that many, or null"
            )


class SwAV(Method):
    """Predict from every view of an image the prototypes that another view was assigned to."""

    Config = SwAVConfig
    queue: Tensor

    def __init__(self, config: SwAVConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        self.backbone = backbone
        self.projector = projection_mlp(
            backbone.embed_dim, config.hidden_dim, config.projection_dim, last_norm="none"
        )
        self.prototypes = nn.Linear(config.projection_dim, config.num_prototypes, bias=False)
        self._normalize_prototypes()
        if config.queue_length is not None:
            if config.queue_length > data.num_images:
                raise ConfigError(
                    f"method.queue_length={config.queue_length} is longer than the data set of "
                    f"{data.num_images} images: use at most that many, or null"
                )
            queue = torch.zeros(config.queue_length, _NUM_LARGE, config.projection_dim)
            self.register_buffer("queue", queue)
        self._new_features: Tensor | None = None  # (N, 2, D) of the current step

    @property
    def encoder(self) -> Backbone:
        """The backbone without the projector."""
        return self.backbone

    @property
    def projection_head(self) -> nn.Sequential:
        """The projector."""
        return self.projector

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Return the loss of all views; batch norm is over all views of equal size."""
        n = len(batch.views[0])
        features = torch.cat(
            [self.backbone(torch.cat(list(g))) for g in _group_by_size(batch.views)]
        )
        projected = at_least_float32(self.projector(features))  # (VN, D)
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(projected, dim=1)
            scores = self.prototypes(z).split(n)  # V of (N, K)
        codes = [self._codes(scores[i].detach(), i, progress) for i in range(_NUM_LARGE)]
        self._new_features = torch.stack(z.detach().split(n)[:_NUM_LARGE], dim=1)
        loss = swav_loss(scores, codes, temperature=self.config.temperature)
        metrics = _metrics(scores[0].detach(), codes) if progress.is_logged else {}
        return LossOutput(loss, features[:n].detach(), metrics)

    def before_optimizer_step(self, progress: Progress) -> None:
        """Drop the prototypes' gradient at first, so that no optimizer changes them."""
        if progress.step < progress.in_steps(self.config.frozen):
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_optimizer_step(self, progress: Progress) -> None:
        """Normalise the prototypes to length 1, and put all ranks' features into the queue."""
        self._normalize_prototypes()
        steps = progress.step - progress.in_steps(self.config.queue_start)
        if self.config.queue_length is not None and steps >= 0:
            assert self._new_features is not None
            rows = gather_batch_no_grad(self._new_features)  # (RN, 2, D), the same on every rank
            slot = torch.arange(len(rows), device=rows.device) + steps * len(rows)
            self.queue[slot % self.config.queue_length] = rows.to(self.queue.dtype)
        self._new_features = None

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def _codes(self, scores: Tensor, view: int, progress: Progress) -> Tensor:
        """Return the codes of a large view, ``(N, K)``, using the queue if it is full."""
        queue_scores = None
        length = self.config.queue_length
        steps = progress.step - progress.in_steps(self.config.queue_start)
        if length is not None and steps * len(scores) * rank_and_size()[1] >= length:
            weight = self.prototypes.weight.detach()
            queue_scores = F.linear(self.queue[:, view].to(weight.dtype), weight)  # (L, K)
        return sinkhorn_codes(
            scores,
            epsilon=self.config.epsilon,
            iterations=self.config.sinkhorn_iterations,
            queue_scores=queue_scores,
        )


def _group_by_size(views: Sequence[Tensor]) -> Iterator[Iterator[Tensor]]:
    """Group consecutive views of equal size."""
    return (group for _, group in groupby(views, key=lambda view: view.shape[-2:]))


@torch.no_grad()
def _metrics(scores: Tensor, codes: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return how hard the codes are, how many prototypes are in use, and how views agree."""
    nearest = F.one_hot(scores.argmax(dim=1), scores.shape[1]).to(scores.dtype)
    usage = mean_over_ranks(nearest.mean(dim=0))  # (K)
    agrees = codes[0].argmax(dim=1) == codes[1].argmax(dim=1)
    return {
        # In nats: at most log K; 0 if every code is a single prototype.
        "swav/code_entropy": torch.special.entr(torch.cat(list(codes))).sum(dim=1).mean(),
        # Over the share of a batch's images nearest to each prototype; 0 is a collapse.
        "swav/prototype_entropy": torch.special.entr(usage).sum(),
        "swav/code_agreement": agrees.to(scores.dtype).mean(),
    }


METHOD = SwAV
