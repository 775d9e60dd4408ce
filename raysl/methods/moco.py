"""MoCo, versions 1 and 2.

K. He, H. Fan, Y. Wu, S. Xie, R. Girshick: "Momentum Contrast for Unsupervised Visual
Representation Learning", 2019, arXiv:1911.05722v3. Version 2 (MLP head, other views, cosine
schedule): X. Chen, H. Fan, R. Girshick, K. He: "Improved Baselines with Momentum Contrastive
Learning", 2020, arXiv:2003.04297v1.
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.config.base import PositiveFloat, PositiveInt, Probability
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import LossOutput, Method, MethodConfig, Progress
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import gather_batch_no_grad, rank_and_size
from raysl.nn.ema import ema_update_
from raysl.nn.heads import projection_mlp


def info_nce_loss(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    r"""Cross entropy of a query's own key against the keys of a queue.

    .. math::
        L_q = -\log \frac{\exp(q \cdot k_+/\tau)}
                         {\exp(q \cdot k_+/\tau) + \sum_i \exp(q \cdot k_i/\tau)}

    Args:
        query: ``(N, D)``, any float dtype, not normalised.
        key: The positive of each query, ``(N, D)``, not normalised.
        queue: The negatives, ``(K, D)``, not normalised.
        temperature: Tau, > 0.

    Returns:
        Scalar float32 >= 0, the mean over the N queries. Uniform embeddings give log(K + 1).

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Eq. (1) of arXiv:1911.05722v3. Similarities are float32, also under autocast.
    """
    logits = _logits(query, key, queue, temperature=temperature)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def _logits(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Return ``(N, 1 + K)`` logits; column 0 is the positive."""
    fits = query.ndim == 2 and query.shape == key.shape and queue.ndim == 2
    if not fits or queue.shape[1] != query.shape[1]:
        raise ShapeError(
            f"query and key must be (N, D) and queue (K, D); got {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(queue.shape)}"
        )
    with torch.autocast(query.device.type, enabled=False):
        q, k, negatives = (F.normalize(x.float(), dim=1) for x in (query, key, queue))
        positive = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
        return torch.cat([positive, q @ negatives.T], dim=1) / temperature


class MoCoConfig(MethodConfig):
    """Settings of MoCo; the defaults are version 2's."""

    name: Literal["moco"] = "moco"
    temperature: PositiveFloat = 0.2
    """Tau: 0.07 in version 1, 0.2 in version 2."""
    head: Literal["linear", "mlp"] = "mlp"
    """linear in version 1, a hidden layer with ReLU in version 2; neither has batch norm."""
    projection_dim: PositiveInt = 128
    """Width of queries and keys."""
    queue_length: PositiveInt = 65536
    """K, the negatives; at most the images of the data set, else old keys of the query's own image
    are among them. It need not be a multiple of the batch."""
    ema_momentum: Probability = 0.999
    """m of Eq. (2): how much of the key encoder stays at each step."""
    shuffle_batch_norm: bool = True
    """Give the key encoder the images in another order over all workers (sec. 3.3), so that batch
    norm statistics do not tell which key belongs to which query. It matters with batch norm over
    each worker's own images (on several workers) or over splits; not with sync."""
    symmetric: bool = False
    """Also use view 1 as the query and view 0 as the key, and take the mean: twice the work a step
    (the authors' CIFAR-10 demonstration)."""

    def check(self, *, global_batch_size: int, num_workers: int) -> None:
        """Refuse a queue shorter than the batch: it could not hold one step's keys."""
        keys = global_batch_size * (2 if self.symmetric else 1)
        if self.queue_length < keys:
            raise ConfigError(
                f"method.queue_length={self.queue_length} is shorter than the {keys} keys of one "
                f"step; use at least {keys}, or a smaller train.global_batch_size"
            )


class MoCo(Method):
    """A query encoder learns to find its key, made by its moving average, in a queue of keys."""

    Config = MoCoConfig
    queue: Tensor
    queue_place: Tensor

    def __init__(self, config: MoCoConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.config = config
        layers = 1 if config.head == "linear" else 2
        width = backbone.embed_dim
        head = projection_mlp(
            width, width, config.projection_dim, num_layers=layers, batch_norm=False
        )
        self.query_encoder = nn.Sequential(backbone, head)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        queue = torch.randn(config.queue_length, config.projection_dim)
        self.register_buffer("queue", F.normalize(queue, dim=1))
        self.register_buffer("queue_place", torch.zeros((), dtype=torch.long))
        self._new_keys: Tensor | None = None

    @property
    def encoder(self) -> Backbone:
        """The backbone of the query encoder, as in the paper."""
        backbone = self.query_encoder[0]
        assert isinstance(backbone, Backbone)
        return backbone

    def loss(self, views: Sequence[Tensor], progress: Progress) -> LossOutput:
        """Return InfoNCE of queries from view 0 against keys from view 1 and the queue."""
        pairs = [(views[0], views[1])]
        if self.config.symmetric:
            pairs.append((views[1], views[0]))
        losses, found, keys = [], [], []
        features: Tensor | None = None
        for number, (query_view, key_view) in enumerate(pairs):
            pair_features = self.query_encoder[0](query_view)
            query = self.query_encoder[1](pair_features)
            key = self._keys(key_view, progress, number)
            logits = _logits(query, key, self.queue, temperature=self.config.temperature)
            losses.append(F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long)))
            found.append((logits.detach().argmax(dim=1) == 0).float().mean())
            keys.append(key)
            features = pair_features.detach() if features is None else features
        assert features is not None
        self._new_keys = F.normalize(torch.cat(keys).float(), dim=1)
        metrics = {"moco/partner_top1": torch.stack(found).mean()}
        return LossOutput(torch.stack(losses).mean(), features, metrics)

    @torch.no_grad()
    def _keys(self, images: Tensor, progress: Progress, number: int) -> Tensor:
        """Encode keys, with batch norm over a random part of all ranks' images (sec. 3.3)."""
        if not self.config.shuffle_batch_norm:
            return self.key_encoder(images)  # type: ignore[no-any-return]
        rank, size = rank_and_size()
        n = images.shape[0]
        everything = gather_batch_no_grad(images)  # (RN, 3, S, S)
        generator = progress.shared_generator()
        for _ in range(number + 1):
            order = torch.randperm(size * n, generator=generator)
        order = order.to(images.device)
        mine = everything[order[rank * n : (rank + 1) * n]]
        keys = gather_batch_no_grad(self.key_encoder(mine))  # (RN, D), in shuffled order
        back = torch.empty_like(order)
        back[order] = torch.arange(size * n, device=order.device)
        return keys[back[rank * n : (rank + 1) * n]]

    @torch.no_grad()
    def after_optimizer_step(self, progress: Progress) -> None:
        """Move the key encoder (Eq. (2)) and put all ranks' keys into the queue."""
        ema_update_(self.key_encoder, self.query_encoder, momentum=self.config.ema_momentum)
        assert self._new_keys is not None
        keys = gather_batch_no_grad(self._new_keys)  # (RN, D), the same on every rank
        length = self.config.queue_length
        places = (self.queue_place + torch.arange(len(keys), device=keys.device)) % length
        self.queue[places] = keys
        self.queue_place.copy_((self.queue_place + len(keys)) % length)
        self._new_keys = None


METHOD = MoCo
