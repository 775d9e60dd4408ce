"""MoCo, versions 1 and 2.

K. He, H. Fan, Y. Wu, S. Xie, R. Girshick: "Momentum Contrast for Unsupervised Visual
Representation Learning", 2019, arXiv:1911.05722v3. Version 2 (MLP head, other views, cosine
schedule): X. Chen, H. Fan, R. Girshick, K. He: "Improved Baselines with Momentum Contrastive
Learning", 2020, arXiv:2003.04297v1.
"""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from raysl.config.base import PositiveFloat, PositiveInt, Probability
from raysl.errors import ShapeError
from raysl.methods.base import (
    Batch,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    RunShape,
    SizeDefault,
    TrainingSet,
    at_most_dataset,
)
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import gather_batch_no_grad, rank_and_size
from raysl.nn.contrast import Contrast, KeyQueue, check_queue_length, contrast, unit_rows
from raysl.nn.ema import ema_update_
from raysl.nn.geometry import alignment, uniformity
from raysl.nn.heads import projection_mlp


def info_nce_loss(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    r"""Compute the cross entropy of a query's own key against the keys of a queue.

    .. math::
        L_q = -\log \frac{\exp(q \cdot k_+/\tau)}
                         {\exp(q \cdot k_+/\tau) + \sum_i \exp(q \cdot k_i/\tau)}

    Args:
        query: ``(N, D)``, any float dtype, not normalised.
        key: The positive of each query, ``(N, D)``, not normalised.
        queue: The negatives, ``(K, D)``, not normalised.
        temperature: Tau, > 0.

    Returns:
        Scalar float32 (float64 for such embeddings) >= 0, the mean over the N queries. Uniform
        embeddings give log(K + 1).

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Eq. (1) of arXiv:1911.05722v3. Similarities are float32, also under autocast.
    """
    return _info_nce(query, key, unit_rows(queue), temperature=temperature).loss


def _info_nce(query: Tensor, key: Tensor, negatives: Tensor, *, temperature: float) -> Contrast:
    """Compare queries and keys, not normalised, with negatives of length 1."""
    fits = query.ndim == 2 and query.shape == key.shape and negatives.ndim == 2
    if not fits or negatives.shape[1] != query.shape[1]:
        raise ShapeError(
            f"query and key must be (N, D) and queue (K, D); got {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(negatives.shape)}"
        )
    rows = unit_rows(query)
    return contrast(rows, unit_rows(key), negatives.to(rows.dtype), temperature=temperature)


_PAPER_QUEUE = 65536  # keys


class MoCoConfig(MethodConfig):
    """Settings of MoCo; the defaults are version 2's."""

    name: Literal["moco"] = "moco"
    temperature: PositiveFloat = 0.2
    """Tau: 0.07 in version 1, 0.2 in version 2."""
    head: Literal["linear", "mlp"] = "mlp"
    """linear in version 1, a hidden layer with ReLU in version 2; neither has batch norm."""
    projection_dim: PositiveInt = 128
    """Width of queries and keys."""
    queue_length: PositiveInt | None = None
    """K, number of negative keys; null takes the paper's 65,536, or the number of images if it is
    smaller. A longer queue than that is rejected: it would hold old keys of the query's own image
    as negatives. It need not be a multiple of the batch."""
    ema_momentum: Probability = 0.999
    """m of Eq. (2): share of the key encoder kept at each step."""
    shuffle_batch_norm: bool = True
    """Shuffle the key encoder's images over all workers (sec. 3.3), so that batch norm statistics
    do not reveal which key belongs to which query. Relevant if batch norm is over each worker's own
    images (on several workers) or over splits; not with sync."""
    symmetric: bool = False
    """Also use view 1 as the query and view 0 as the key, and take the mean: twice the work for a
    step. The authors' CIFAR-10 demonstration takes the sum instead, which under SGD equals the mean
    with twice their learning rate and half their weight decay."""

    @property
    def keys_per_image(self) -> int:
        """Number of keys of an image in a step."""
        return 2 if self.symmetric else 1

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return 1 or 2, depending on the paper's version."""
        return 1 if self.head == "linear" else 2

    def check(self, shape: RunShape) -> None:
        """Reject a queue shorter than the keys of one step."""
        if self.queue_length is not None:
            check_queue_length(
                "method.queue_length",
                self.queue_length,
                keys_per_step=self.keys_per_image * shape.global_batch_size,
            )

    def size_defaults(self, data: TrainingSet) -> Mapping[str, SizeDefault]:
        """Use the paper's queue length, limited to the size of the data set."""
        if self.queue_length is not None:
            return {}
        return {"queue_length": at_most_dataset(_PAPER_QUEUE, data)}

    def length_for(self, data: TrainingSet) -> int:
        """Return the queue's length for a data set.

        Raises:
            ConfigError: If it is longer than the data set, or shorter than the keys of a step.
        """
        length = self.queue_length or int(self.size_defaults(data)["queue_length"].value)
        check_queue_length(
            "method.queue_length",
            length,
            keys_per_step=self.keys_per_image * data.global_batch_size,
            num_images=data.num_images,
        )
        return length


class MoCo(Method):
    """A query encoder learns to find, among a queue of keys, the key of its moving average."""

    Config = MoCoConfig

    def __init__(self, config: MoCoConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        layers = config.projection_head_layers(is_vit=False)
        width = backbone.embed_dim
        head = projection_mlp(
            width, width, config.projection_dim, num_layers=layers, batch_norm=False
        )
        self.query_encoder = nn.Sequential(backbone, head)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.queue = KeyQueue(config.length_for(data), config.projection_dim)
        self._new_keys: Tensor | None = None

    @property
    def encoder(self) -> Backbone:
        """The backbone of the query encoder, as in the paper."""
        backbone = self.query_encoder[0]
        assert isinstance(backbone, Backbone)
        return backbone

    @property
    def projection_head(self) -> nn.Sequential:
        """The head of the query encoder."""
        head = self.query_encoder[1]
        assert isinstance(head, nn.Sequential)
        return head

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Return InfoNCE of queries from view 0 against keys from view 1 and the queue."""
        views = batch.views
        pairs = [(views[0], views[1])]
        if self.config.symmetric:
            pairs.append((views[1], views[0]))
        results, keys = [], []
        features, first_query = None, None
        for number, (query_view, key_view) in enumerate(pairs):
            pair_features = self.query_encoder[0](query_view)
            query = self.query_encoder[1](pair_features)
            key = self._keys(key_view, progress, number)
            results.append(
                _info_nce(query, key, self.queue.keys, temperature=self.config.temperature)
            )
            keys.append(key)
            if features is None:
                features, first_query = pair_features.detach(), query.detach()
        assert features is not None
        assert first_query is not None
        new_keys = unit_rows(torch.cat(keys))
        self._new_keys = new_keys.view(len(keys), -1, new_keys.shape[1]).transpose(
            0, 1
        )  # (N, 1|2, D)
        loss = torch.stack([result.loss for result in results]).mean()
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        metrics = {
            "moco/partner_top1": torch.stack([result.partner_top1 for result in results]).mean(),
            "moco/queue_age_steps": self.queue.age_steps(progress.step),
            "moco/alignment": alignment(first_query, keys[0]),
            "moco/uniformity": uniformity(first_query),
        }
        return LossOutput(loss, features, metrics)

    @torch.no_grad()
    def _keys(self, images: Tensor, progress: Progress, number: int) -> Tensor:
        """Return keys, with batch norm over a random part of all ranks' images (sec. 3.3)."""
        if not self.config.shuffle_batch_norm:
            return self.key_encoder(images)  # type: ignore[no-any-return]
        rank, size = rank_and_size()
        n = images.shape[0]
        all_images = gather_batch_no_grad(images)  # (RN, 3, S, S)
        generator = progress.shared_generator()
        for _ in range(number + 1):
            order = torch.randperm(size * n, generator=generator)
        order = order.to(images.device)
        mine = all_images[order[rank * n : (rank + 1) * n]]
        keys = gather_batch_no_grad(self.key_encoder(mine))  # (RN, D), in shuffled order
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(size * n, device=order.device)
        return keys[inverse[rank * n : (rank + 1) * n]]

    @torch.no_grad()
    def after_optimizer_step(self, progress: Progress) -> None:
        """Update the key encoder (Eq. (2)) and put all ranks' keys into the queue."""
        ema_update_(self.key_encoder, self.query_encoder, momentum=self.config.ema_momentum)
        assert self._new_keys is not None
        new_keys = gather_batch_no_grad(self._new_keys)
        # View by view, as one worker would: keys of a step that leave the queue are then the same.
        self.queue.put(new_keys.transpose(0, 1).flatten(0, 1), step=progress.step)
        self._new_keys = None


METHOD = MoCo
