"""Noise-contrastive estimation, and instance discrimination with a memory bank.

M. Gutmann, A. Hyvarinen: "Noise-contrastive estimation: A new estimation principle for
unnormalized statistical models", AISTATS 2010 (longer: JMLR 13, 2012). Z. Wu, Y. Xiong, S. X. Yu,
D. Lin: "Unsupervised Feature Learning via Non-Parametric Instance-level Discrimination", CVPR 2018,
arXiv:1805.01978v1; "the authors' code" is that of the latter.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.config.base import Idle, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from raysl.errors import ConfigError
from raysl.methods.base import (
    Batch,
    EmbeddingMethod,
    LossOutput,
    MethodConfig,
    Progress,
    RunShape,
    SizeDefault,
    TrainingSet,
    at_most_dataset,
)
from raysl.nn.backbones import Backbone
from raysl.nn.collectives import gather_batch_no_grad
from raysl.nn.contrast import log_sum_exp
from raysl.nn.geometry import log_mean_exp_on_sphere
from raysl.nn.heads import projection_mlp
from raysl.nn.noise_contrast import noise_contrastive_loss
from raysl.nn.precision import at_least_float32

NUM_NOISE = 4096  # Wu et al., secs. 4.1 and 4.2
FULL_PRODUCT = 16
"""Up to this many rows of the bank per noise sample, the product with the whole bank is faster."""
MOMENT_MOMENTUM = 0.99  # share of the second moments kept at each step
ISOTROPIC_SHARE = 0.05
"""Share of the uniform direction in the Gaussian noise, for a density everywhere."""


def nce_loss(
    data_logits: Tensor,
    noise_logits: Tensor,
    *,
    data_log_noise: Tensor,
    noise_log_noise: Tensor,
    num_noise: float,
) -> Tensor:
    r"""Classify data against samples of a known noise distribution.

    .. math::
        J = -\frac{1}{N} \sum_i \Big[ \log h(x_i) + \sum_{k=1}^{K} \log(1 - h(y_{ik})) \Big],
        \qquad h(x) = \frac{p_m(x)}{p_m(x) + \nu p_n(x)}

    Args:
        data_logits: log p_m of the data: the log of the unnormalised model minus that of its
            normaliser, ``(N,)``.
        noise_logits: The same for each datum's K noise samples, ``(N, K)``.
        data_log_noise: log p_n, the noise distribution, of the data, ``(N,)``.
        noise_log_noise: log p_n of the noise samples, ``(N, K)``.
        num_noise: nu, number of noise samples per datum, > 0; m in Wu et al.

    Returns:
        Scalar >= 0, float32, or float64 for float64 logits: the data term plus the sum over the K
        noise terms, mean over N. With p_m = p_n, log(1 + nu) + K log(1 + 1 / nu).

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Wu et al., Eqs. (6) and (7); Gutmann and Hyvarinen 2012, Eq. (8). Logits are float32
    also under autocast.
    Departs: A sum over noise; Wu et al. write m times an expectation, and sum in their code. No
        1e-7 in denominators, which that code needs outside of the log domain.
    """
    return noise_contrastive_loss(
        data_logits,
        noise_logits,
        data_log_noise=data_log_noise,
        noise_log_noise=noise_log_noise,
        num_noise=num_noise,
    )


class NCEConfig(MethodConfig):
    """Settings of instance discrimination by noise-contrastive estimation."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("class_power",), {"noise": ("uniform", "gaussian")}),)
    name: Literal["nce"] = "nce"
    temperature: PositiveFloat = 0.07
    """Tau of Eq. (2): 0.07 for ImageNet (sec. 4.2), 0.1 for CIFAR-10 in the authors' code."""
    num_noise: PositiveInt | None = None
    """m of Eq. (6), number of noise samples per image; null takes 4,096 (sec. 4.1), at most the
    number of images."""
    noise: Literal["uniform", "labels", "gaussian"] = "uniform"
    """Distribution of noise. uniform: any row of the bank (the paper). labels: a class, by its
    number of images to the power of :attr:`class_power`, then any of its rows; rows of unknown
    class (a label is learnt when its image is first seen) have the mean weight. gaussian:
    directions of a Gaussian with zero mean and the second moments of recent embeddings; samples are
    points on the sphere, not rows of the bank, and are shared by a worker's images."""
    class_power: Probability = 0.75
    """With ``noise: labels``: 1 is uniform over images, 0 over classes; 0.75 as for word2vec's
    unigrams (Mikolov et al. 2013, arXiv:1310.4546v1, sec. 2.2)."""
    normalizer: Literal["first_batch", "learned", "exact"] = "first_batch"
    """Z of Eq. (4). first_batch: estimated once and kept (Eq. (8)). learned: log Z is a parameter
    (Gutmann and Hyvarinen). exact: the sum over the whole bank for each image, which NCE is meant
    to avoid, but the most stable in short runs; with ``noise: gaussian`` a constant in closed form.
    """
    bank_momentum: Probability = 0.5
    """Share of an image's row kept when it is seen again (the authors' code; the paper replaces
    it). The first embedding replaces the random row."""
    proximal_weight: NonNegativeFloat = 0.0
    """Lambda of Eq. (10): weight of the distance between an embedding and its image's row, once
    seen; the authors' code has none."""
    head: Literal["linear", "mlp"] = "linear"
    """linear as in the paper; mlp has a hidden layer with ReLU."""
    head_batch_norm: bool = False
    """Batch norm after each linear layer, which centres embeddings from the start; the paper has
    none. It helps short runs: untrained embeddings are in a narrow cone."""
    projection_dim: PositiveInt = 128
    """D, width of embeddings and of the bank."""

    @property
    def norms_images(self) -> bool:
        """Whether there is batch norm in the head."""
        return self.head_batch_norm

    @property
    def num_views(self) -> int:
        """One view; the other view of an image is its row in the bank."""
        return 1

    @property
    def uses_labels(self) -> bool:
        """Whether noise is drawn by labels."""
        return self.noise == "labels"

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of layers of the projector."""
        return 1 if self.head == "linear" else 2

    def check(self, shape: RunShape) -> None:
        """Reject a sphere of one dimension, which has no directions."""
        if self.projection_dim == 1:
            raise ConfigError("method.projection_dim=1: the sphere of 1 dimension is two points")

    def size_defaults(self, data: TrainingSet) -> Mapping[str, SizeDefault]:
        """Return the number of noise samples."""
        return {"num_noise": at_most_dataset(NUM_NOISE, data)} if self.num_noise is None else {}


class _Noise(NamedTuple):
    """The noise of one step; densities are relative to the same measure as the model's."""

    logits: Tensor  # (N, K): cosine over temperature
    log_noise: Tensor  # (N, K)
    data_log_noise: Tensor  # (N,), of the images' own rows


class NCE(EmbeddingMethod):
    """Treat each image as a class of its own, distinguished from noise by its memory bank row.

    The model of an image with embedding v is p(i | v) = exp(v . bank[i] / temperature) / Z over the
    rows of the bank or, with Gaussian noise, the density p(u | v) = exp(v . u / temperature) / Z
    over the unit sphere, relative to the uniform one; there, too, the datum is the image's own row.

    The bank takes 4 bytes x images x ``projection_dim``: 26 MB for CIFAR-10, 656 MB for ImageNet,
    on each device and in each checkpoint.

    Departs: The authors' code starts rows as random vectors of about unit length and mixes them
        into the first embedding; ours have unit length, as in the paper, and are replaced. It
        includes the data in the mean that estimates Z; ours is importance sampling from the noise
        alone.
    """

    Config = NCEConfig
    bank: Tensor
    bank_step: Tensor
    bank_label: Tensor
    second_moment: Tensor
    log_normalizer: Tensor
    normalizer_known: Tensor
    class_weight: Tensor

    def __init__(self, config: NCEConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        self.num_images = data.num_images
        self.num_noise = config.num_noise or int(config.size_defaults(data)["num_noise"].value)
        self.backbone = backbone
        width, dim = backbone.embed_dim, config.projection_dim
        layers = config.projection_head_layers(is_vit=False)
        self.projector = projection_mlp(
            width, width, dim, num_layers=layers, batch_norm=config.head_batch_norm
        )
        bank = F.normalize(torch.randn(data.num_images, dim), dim=1)
        self.register_buffer("bank", bank)  # (n, D)
        self.register_buffer("bank_step", torch.full((data.num_images,), -1))
        if config.noise == "labels":
            self.register_buffer("bank_label", torch.full((data.num_images,), -1))
            weight = _class_weight(data, power=config.class_power)
            self.register_buffer("class_weight", weight, persistent=False)
        if config.noise == "gaussian":
            self.register_buffer("second_moment", torch.eye(dim) / dim)
        # log Z for random rows; the initial value if it is learnt.
        log_z = log_mean_exp_on_sphere(dim, 1 / config.temperature)
        if config.noise != "gaussian":
            log_z += math.log(data.num_images)
        if config.normalizer == "learned":
            self.log_normalizer = nn.Parameter(torch.tensor(log_z))
        else:
            self.register_buffer("log_normalizer", torch.tensor(log_z))
            self.register_buffer("normalizer_known", torch.zeros((), dtype=torch.long))
        self._new_rows: tuple[Tensor, Tensor, Tensor | None] | None = None

    @property
    def encoder(self) -> Backbone:
        """The backbone without the head."""
        return self.backbone

    @property
    def projection_head(self) -> nn.Sequential:
        """The projector."""
        return self.projector

    def embeddings(self, batch: Batch, progress: Progress) -> tuple[Tensor, ...]:
        """Return features and embeddings of the view, not normalised."""
        features = self.backbone(batch.views[0])
        return features.detach(), self.projector(features)

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Return the loss of Eq. (7), or with the proximal term Eq. (10), against the bank."""
        features, z = embeddings
        config = self.config
        with torch.autocast(z.device.type, enabled=False):
            v = F.normalize(at_least_float32(z), dim=1)  # (N, D)
            own_rows = self.bank[batch.index].to(v.dtype)
            cosine = (v * own_rows).sum(dim=1)
            noise = (
                self._gaussian(v, own_rows) if config.noise == "gaussian" else self._rows(v, batch)
            )
            log_z = self._log_normalizer(v, noise)
            data_logits = cosine / config.temperature - log_z
            noise_logits = noise.logits - log_z[..., None]
            loss = nce_loss(
                data_logits,
                noise_logits,
                data_log_noise=noise.data_log_noise,
                noise_log_noise=noise.log_noise,
                num_noise=self.num_noise,
            )
            seen = self.bank_step[batch.index] >= 0
            if config.proximal_weight > 0:
                drift = (v - own_rows).square().sum(dim=1)
                loss = loss + config.proximal_weight * (drift * seen).mean()
        self._new_rows = (batch.index, v.detach(), batch.labels)
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        log_m = math.log(self.num_noise)
        metrics = {
            "nce/data_right": (data_logits - noise.data_log_noise > log_m).float().mean(),
            "nce/noise_right": (noise_logits - noise.log_noise < log_m).float().mean(),
            "nce/log_normalizer": log_z.detach().float().mean(),
            "nce/own_row_cosine": cosine.detach().float().mean(),
            "nce/bank_age_epochs": self._age_epochs(progress),
        }
        return LossOutput(loss, features, metrics)

    def _rows(self, v: Tensor, batch: Batch) -> _Noise:
        """Draw rows of the bank for each image; densities are relative to the counting measure."""
        n, m = len(v), self.num_noise
        weight = self._row_weight()
        if weight is None:
            rows = torch.randint(self.num_images, (n, m), device=v.device)
            log_noise = v.new_full((n, m), -math.log(self.num_images))
            data_log_noise = log_noise[:, 0]
        else:
            rising = weight.cumsum(dim=0)
            drawn = torch.rand((n, m), device=v.device, dtype=rising.dtype) * rising[-1]
            rows = torch.searchsorted(rising, drawn, right=True).clamp_max(self.num_images - 1)
            log_weight = (weight.log() - rising[-1].log()).to(v.dtype)
            log_noise, data_log_noise = log_weight[rows], log_weight[batch.index]
        bank = self.bank.to(v.dtype)
        if self.num_images <= FULL_PRODUCT * m:
            logits = (v @ bank.T).gather(1, rows)
        else:
            logits = torch.bmm(bank[rows], v[:, :, None])[:, :, 0]
        return _Noise(logits / self.config.temperature, log_noise, data_log_noise)

    def _row_weight(self) -> Tensor | None:
        """Return the weight of each row as noise, up to a constant; None if all are equal."""
        if self.config.noise == "uniform":
            return None
        # The last weight, at -1, is for rows of unknown class.
        return self.class_weight[self.bank_label]

    def _gaussian(self, v: Tensor, own_rows: Tensor) -> _Noise:
        """Draw directions of a Gaussian; densities are relative to the uniform one on the sphere.

        With u = x / |x| and x from N(0, S), log p_n(u) = -log det(S) / 2 - D log(u' S^-1 u) / 2.
        """
        n, d = v.shape
        moment = self.second_moment.to(v.dtype)
        isotropic = torch.eye(d, dtype=v.dtype, device=v.device) / d
        root = torch.linalg.cholesky(moment.lerp(isotropic, ISOTROPIC_SHARE))
        x = torch.randn(self.num_noise, d, dtype=v.dtype, device=v.device) @ root.T
        u = F.normalize(x, dim=1)  # (K, D)

        def log_density(points: Tensor) -> Tensor:
            white: Tensor = torch.linalg.solve_triangular(root, points.T, upper=False)
            log_root: Tensor = root.diagonal().log().sum()  # of det(S)
            return -log_root - d / 2 * white.square().sum(dim=0).log()

        log_noise = log_density(u).expand(n, -1)
        return _Noise(v @ u.T / self.config.temperature, log_noise, log_density(own_rows))

    def _log_normalizer(self, v: Tensor, noise: _Noise) -> Tensor:
        """Return log Z: a scalar, or one value per image if it is summed exactly."""
        config = self.config
        if config.normalizer == "exact" and config.noise != "gaussian":
            return log_sum_exp(v, self.bank.to(v.dtype), temperature=config.temperature)
        if config.normalizer == "first_batch":
            with torch.no_grad():
                ratio = noise.logits - noise.log_noise  # Z is the mean of its exponential
                rank_estimate = ratio.flatten().logsumexp(dim=0) - math.log(ratio.numel())
                all_estimates = gather_batch_no_grad(rank_estimate[None])
                estimate = all_estimates.logsumexp(dim=0) - math.log(len(all_estimates))
                log_z = torch.where(self.normalizer_known > 0, self.log_normalizer, estimate)
                self.log_normalizer.copy_(log_z)
                self.normalizer_known.fill_(1)
        return self.log_normalizer.to(v.dtype)

    def _age_epochs(self, progress: Progress) -> Tensor:
        """Return the mean age of the rows that have been seen, in epochs."""
        seen = self.bank_step >= 0
        age = (progress.step - self.bank_step) * seen
        return age.sum() / seen.sum().clamp_min(1) / progress.steps_per_epoch

    @torch.no_grad()
    def after_optimizer_step(self, progress: Progress) -> None:
        """Update the rows of all ranks' images, and their metadata."""
        assert self._new_rows is not None
        index, v, labels = self._new_rows
        self._new_rows = None
        index = gather_batch_no_grad(index)  # (RN,)
        v = gather_batch_no_grad(v).to(self.bank.dtype)  # (RN, D), the same on every rank
        first = _first_of_each(index)
        momentum = self.config.bank_momentum * (self.bank_step[index] >= 0)
        rows = v[first].lerp(self.bank[index], momentum[:, None].to(v.dtype))
        self.bank[index] = F.normalize(rows, dim=1)
        self.bank_step[index] = progress.step
        if self.config.noise == "labels" and labels is not None:
            self.bank_label[index] = gather_batch_no_grad(labels)[first]
        if self.config.noise == "gaussian":
            moment = v.T @ v / len(v)
            self.second_moment.lerp_(moment, 1 - MOMENT_MOMENTUM)


def _class_weight(data: TrainingSet, *, power: float) -> Tensor:
    """Return the noise weight of a row of each class, then the mean of all rows, ``(C + 1,)``.

    A class is drawn by its count to the power of ``power``, then one of its rows. So a row's weight
    is the count to the power of ``power - 1``; float64, because many are summed.

    Raises:
        ConfigError: If the classes are not known.
    """
    if data.class_counts is None:
        raise ConfigError(
            "method.noise=labels: data.source has no labels; use one that has, or noise: uniform"
        )
    count = torch.tensor(data.class_counts, dtype=torch.float64)
    mean = count[count > 0].pow(power).sum() / count.sum().clamp_min(1)
    return torch.cat([count.clamp_min(1).pow(power - 1), mean[None]])


def _first_of_each(index: Tensor) -> Tensor:
    """Return for each entry the index of the first entry with the same value, ``(N,)``.

    An image may occur twice in a batch: then its first embedding is written twice, so that the
    result does not depend on the order of writes, and ranks agree.
    """
    value, order = index.sort(stable=True)
    position = torch.arange(len(index), device=index.device)
    is_new = torch.ones_like(value, dtype=torch.bool)
    is_new[1:] = value[1:] != value[:-1]
    start = torch.where(is_new, position, 0).cummax(dim=0).values
    first = torch.empty_like(position)
    first[order] = order[start]
    return first


METHOD = NCE
