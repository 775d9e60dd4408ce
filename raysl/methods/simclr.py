"""SimCLR, versions 1 and 2.

T. Chen, S. Kornblith, M. Norouzi, G. Hinton: "A Simple Framework for Contrastive Learning of
Visual Representations", 2020, arXiv:2002.05709v3. Version 2 (a deeper head, wider and deeper
selective-kernel ResNets, a memory of negatives): T. Chen, S. Kornblith, K. Swersky, M. Norouzi,
G. Hinton: "Big Self-Supervised Models are Strong Semi-Supervised Learners", 2020,
arXiv:2006.10029v2.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raysl.config.base import Idle, PositiveFloat, PositiveInt, Probability
from raysl.errors import ShapeError
from raysl.methods.base import (
    Batch,
    LossOutput,
    MethodConfig,
    Progress,
    SiameseMethod,
    SizeDefault,
    TrainingSet,
    at_most_dataset,
)
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import gather_batch, gather_batch_no_grad, rank_and_size
from raysl.nn.contrast import Contrast, KeyQueue, check_queue_length, contrast, unit_rows
from raysl.nn.ema import ema_update_
from raysl.nn.geometry import alignment, uniformity
from raysl.nn.heads import projection_mlp

_PAPER_MEMORY = 65536  # embeddings


def nt_xent_loss(z0: Tensor, z1: Tensor, *, temperature: float) -> Tensor:
    r"""Compute the normalised temperature-scaled cross entropy over the views of all ranks.

    .. math::
        \ell_{i,j} = -\log \frac{\exp(s_{i,j}/\tau)}{\sum_{k \ne i} \exp(s_{i,k}/\tau)}

    Here s is the cosine similarity, and the mean runs over both orders of each of this rank's N
    pairs. Negatives are the 2RN - 2 other embeddings of the R ranks.

    Args:
        z0: Projections of view 0, ``(N, D)``, any float dtype, not normalised.
        z1: Projections of view 1, same shape; row i comes from the same image as ``z0[i]``.
        temperature: Tau, > 0.

    Returns:
        Scalar float32 (float64 for such embeddings), >= 0. Uniform embeddings give log(2RN - 1).

    Raises:
        ShapeError: If the two shapes differ or are not ``(N, D)``.

    Source: Eq. (1) and Algorithm 1. Similarities are float32, also under autocast, and computed in
    tiles: memory grows with RN, not with its square.
    """
    return _nt_xent(z0, z1, temperature=temperature).loss


def _nt_xent(
    z0: Tensor, z1: Tensor, *, temperature: float, memory: Tensor | None = None
) -> Contrast:
    if z0.ndim != 2 or z0.shape != z1.shape:
        raise ShapeError(f"z0 and z1 must both be (N, D); got {tuple(z0.shape)}, {tuple(z1.shape)}")
    n = z0.shape[0]
    rows = unit_rows(torch.cat([z0, z1]))  # (2N, D)
    keys = gather_batch(rows)  # (2RN, D): rank 0's views 0 and 1, rank 1's, ...
    own_keys = torch.arange(2 * n, device=z0.device) + rank_and_size()[0] * 2 * n
    partner_keys = own_keys.roll(n)
    # The sum in Eq. (1) skips k = i; the partner is already included as the positive.
    excluded = torch.stack([own_keys, partner_keys], dim=1)
    return contrast(
        rows, rows.roll(n, 0), keys, temperature=temperature, excluded=excluded, memory=memory
    )


class SimCLRConfig(MethodConfig):
    """Settings of SimCLR."""

    compares_images: ClassVar[bool] = True
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("hidden_dim",), {"projection_layers": (1,)}),
        Idle(("memory_length", "ema_momentum"), {"memory": (False,)}),
    )
    name: Literal["simclr"] = "simclr"
    temperature: PositiveFloat = 0.1
    """Tau of Eq. (1): 0.1 for ImageNet at batch 4,096 (table 5), 0.5 for CIFAR-10 (B.9)."""
    projection_layers: Annotated[int, Field(ge=1, le=8)] = 2
    """Number of linear layers of the head: 2 in version 1, 3 in version 2."""
    hidden_dim: PositiveInt | None = None
    """Width of the head's hidden layers; null takes the encoder's width, as in the paper."""
    projection_dim: PositiveInt = 128
    """Width of the head's output."""
    memory: bool = False
    """Add earlier outputs of a memory network, the moving average of encoder and head, to the
    negatives (version 2, sec. 2 and appendix D: about one point of linear accuracy there)."""
    memory_length: PositiveInt | None = None
    """Number of embeddings in the memory; null takes the authors' 64K (version 2, sec. 3.1), or the
    number of images if it is smaller. A longer memory than that is rejected."""
    ema_momentum: Probability = 0.999
    """Share of the memory network kept at each step (version 2, as in MoCo)."""

    @property
    def norms_images(self) -> bool:
        """True: there is batch norm after the encoder."""
        return True

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return self.projection_layers

    def size_defaults(self, data: TrainingSet) -> Mapping[str, SizeDefault]:
        """Use the paper's memory length, limited to the size of the data set."""
        if not self.memory or self.memory_length is not None:
            return {}
        return {"memory_length": at_most_dataset(_PAPER_MEMORY, data)}

    def length_for(self, data: TrainingSet) -> int:
        """Return the memory's length for a data set.

        Raises:
            ConfigError: If it is longer than the data set, or shorter than a batch.
        """
        length = self.memory_length or int(self.size_defaults(data)["memory_length"].value)
        check_queue_length(
            "method.memory_length",
            length,
            num_images=data.num_images,
            keys_per_step=data.global_batch_size,
        )
        return length


class SimCLR(SiameseMethod):
    """Attract two views of an image, and repel all other images of the batch.

    Departs: Version 2 describes its memory in two sentences, and the authors' code has none. Here
    the memory network's outputs for view 1 are "buffered as negative examples" of both views from
    the next step on; positives and the batch's own negatives are those of version
    1. As no memory output is a positive, batch norm is not shuffled.
    """

    Config = SimCLRConfig
    norms_views_together: ClassVar[bool] = True  # Algorithm 1

    def __init__(self, config: SimCLRConfig, backbone: Backbone, data: TrainingSet) -> None:
        projector = projection_mlp(
            backbone.embed_dim,
            config.hidden_dim or backbone.embed_dim,
            config.projection_dim,
            num_layers=config.projection_layers,
        )
        super().__init__(config, backbone, data, projector=projector)
        self.temperature = config.temperature
        self.ema_momentum = config.ema_momentum
        self.memory_network: nn.Module | None = None
        self.memory: KeyQueue | None = None
        self._new_keys: Tensor | None = None
        if config.memory:
            online = nn.Sequential(self.backbone, self.projector)
            self.memory_network = copy.deepcopy(online).requires_grad_(False)
            self.memory = KeyQueue(config.length_for(data), config.projection_dim)

    def embeddings(self, batch: Batch, progress: Progress) -> tuple[Tensor, ...]:
        """Return features, the projections of both views, and the new entries of the memory."""
        embedded = super().embeddings(batch, progress)
        if self.memory_network is None:
            return embedded
        with torch.no_grad():
            return *embedded, unit_rows(self.memory_network(batch.views[1]))

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Return NT-Xent of the two views."""
        features, z0, z1 = embeddings[:3]
        memory = None if self.memory is None else self.memory.keys
        loss, partner_top1 = _nt_xent(z0, z1, temperature=self.temperature, memory=memory)
        if self.memory is not None:
            self._new_keys = embeddings[3].detach()
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        metrics = {
            "simclr/partner_top1": partner_top1,
            "simclr/alignment": alignment(z0, z1),
            "simclr/uniformity": uniformity(z0),
        }
        if self.memory is not None:
            metrics["simclr/memory_age_steps"] = self.memory.age_steps(progress.step)
        return LossOutput(loss, features, metrics)

    @torch.no_grad()
    def after_optimizer_step(self, progress: Progress) -> None:
        """Update the memory network, and put its outputs of all ranks into the memory."""
        if self.memory is None or self.memory_network is None:
            return
        online = nn.Sequential(self.backbone, self.projector)
        ema_update_(self.memory_network, online, momentum=self.ema_momentum)
        assert self._new_keys is not None
        self.memory.put(gather_batch_no_grad(self._new_keys), step=progress.step)
        self._new_keys = None


METHOD = SimCLR
