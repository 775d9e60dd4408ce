"""Energy-based model: a Boltzmann density over images, its energy a head on the encoder.

Four ways to train p(x) = exp(-E(x)) / Z with an intractable Z:

- ``mcmc``, maximum likelihood with samples from Langevin chains. Y. Du, I. Mordatch: "Implicit
  Generation and Modeling with Energy-Based Models", 2019, arXiv:1903.08689v6 (IGEBM); W. Grathwohl
  et al.: "Your Classifier is Secretly an Energy Based Model and You Should Treat it Like One",
  2019, arXiv:1912.03263v3 (JEM).
- ``score_matching``, by denoising, at many noise levels: see :mod:`raysl.nn.score_matching`. As in
  Y. Song, S. Ermon: "Improved Techniques for Training Score-Based Generative Models", 2020,
  arXiv:2006.09011v2, technique 3, the level only scales the model: E(x) / sigma.
- ``nce``, against a known density. M. Gutmann, A. Hyvarinen, 2010 and 2012: see
  :mod:`raysl.nn.noise_contrast`.
- ``conditional_nce``, against noise derived from the data. C. Ceylan, M. Gutmann: "Conditional
  Noise-Contrastive Estimation of Unnormalised Models", 2018, arXiv:1806.03664v1: see the same.
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raysl.config.base import Idle, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from raysl.errors import ConfigError
from raysl.methods.base import (
    Batch,
    ImageGrid,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    RunShape,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.contrastive_divergence import contrastive_divergence_loss
from raysl.nn.energies import contrast, mean_where, per_image, range_text
from raysl.nn.langevin import ChainStarts, ReplayBuffer, energy_gradient, evaluation_mode, langevin
from raysl.nn.noise_contrast import conditional_noise_contrastive_loss, noise_contrastive_loss
from raysl.nn.perturbation import Perturbation, perturb
from raysl.nn.precision import at_least_float32
from raysl.nn.score_matching import denoising_score_loss
from raysl.nn.spectral_noise import SpectralGaussian

_NO_CHAINS = {"training": ("score_matching", "nce", "conditional_nce")}
_SHOWN_ROWS = 8  # limit for a picture
_NOISE_SETTINGS, _PERTURBING = ("perturbations", "noise_std_range"), ("mcmc", "conditional_nce")


class EBMConfig(MethodConfig):
    """Settings of the energy-based model.

    Steps, gradients and standard deviations are for pixels from -1 to 1, as JEM's are;
    ``value_range`` converts them. IGEBM's are for pixels from 0 to 1: a step of 10 there is one of
    40 here, a gradient of 0.01 one of 0.005, a standard deviation of 0.005 one of 0.01.
    """

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("langevin_steps", "langevin_step_size", "langevin_noise_std"), _NO_CHAINS),
        Idle(("input_noise_std", "buffer_length", "energy_regularisation"), _NO_CHAINS),
        Idle(("langevin_max_gradient", "restart_prob", "restart_from"), _NO_CHAINS),
        Idle(("restart_from",), {"training": ("mcmc",), "restart_prob": (0,)}),
        Idle(("perturbations",), {"training": ("score_matching", "nce")}),
        Idle(("noise_std_range",), {"training": ("nce",)}),
        Idle(_NOISE_SETTINGS, {"training": ("mcmc",), "restart_from": ("noise", "data")}),
        Idle(("noise_std_range",), {"training": _PERTURBING, "perturbations": (["turn"],)}),
        Idle(("num_noise",), {"training": ("mcmc", "score_matching")}),
    )
    name: Literal["ebm"] = "ebm"
    training: Literal["mcmc", "score_matching", "nce", "conditional_nce"] = "mcmc"
    """How to fit the density: with samples from Langevin chains, by denoising, by classification
    against Gaussian noise of the data's spectrum, or of each image against its ``perturbations``.
    """
    hidden_dim: PositiveInt = 256
    """Width of the energy's head on the features."""
    value_range: tuple[float, float] = (-2.7, 2.7)
    """Lowest and highest normalised pixel value; chains stay in this range. The default covers
    black and white with ImageNet's mean and standard deviation."""
    langevin_steps: Annotated[int, Field(gt=0, le=100_000)] = 20
    """mcmc: steps of each chain in a training step (JEM 20, IGEBM 60)."""
    langevin_step_size: PositiveFloat = 1.0
    """mcmc: factor of the energy's gradient in a step (JEM 1, IGEBM 40)."""
    langevin_max_gradient: PositiveFloat | None = None
    """mcmc: bound on the absolute value of a pixel's gradient in a step; null: none (JEM none,
    IGEBM 0.005, so that a step of 40 moves a pixel by at most a tenth of its range)."""
    langevin_noise_std: NonNegativeFloat = 0.01
    """mcmc: standard deviation of the noise in a step (JEM and IGEBM 0.01)."""
    input_noise_std: NonNegativeFloat = 0.03
    """mcmc: standard deviation of the noise on the data (JEM 0.03)."""
    buffer_length: PositiveInt = 10000
    """mcmc: chains in the replay buffer (JEM and IGEBM 10,000). It takes 6 bytes per pixel in
    memory and in every checkpoint: 61 MB for 10,000 images of 32 px."""
    restart_prob: Probability = 0.05
    """mcmc: probability that a chain restarts from noise (JEM and IGEBM 0.05)."""
    restart_from: Literal["noise", "data", "perturbed_data"] = "noise"
    """mcmc: where such a chain starts; data with a restart_prob of 1 is contrastive divergence.
    perturbed_data: at data changed by ``perturbations``."""
    energy_regularisation: NonNegativeFloat = 0.0
    """mcmc: alpha, weight of squared energies (IGEBM 1, JEM none)."""
    noise_std_range: tuple[PositiveFloat, PositiveFloat] = (0.02, 2.0)
    """score_matching, gaussian perturbations: smallest and largest standard deviation of the
    noise (Song and Ermon: 0.01 and 1 for pixels from 0 to 1), log-uniform for each image."""
    perturbations: Annotated[tuple[Perturbation, ...], Field(min_length=1)] = ("gaussian",)
    """conditional_nce, and chains from perturbed data: how to change an image; each is equally
    likely. gaussian: add noise (Ceylan and Gutmann). turn: rotate by one, two or three quarter
    turns. A repeated name is more likely."""
    num_noise: PositiveInt = 1
    """nce and conditional_nce: nu or kappa, number of noise images for each data image."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> "EBMConfig":
        (low, high), (least, most) = self.value_range, self.noise_std_range
        if low >= high or least > most:
            raise ValueError(
                f"value_range and noise_std_range go from low to high; got {self.value_range} and "
                f"{self.noise_std_range}"
            )
        return self

    @property
    def num_views(self) -> int:
        """One view, the image."""
        return 1

    def check(self, shape: RunShape) -> None:
        """Reject a buffer too small for a separate chain for each image of a step."""
        if self.training == "mcmc" and self.buffer_length < shape.global_batch_size:
            raise ConfigError(
                f"method.buffer_length={self.buffer_length} is shorter than "
                f"train.global_batch_size={shape.global_batch_size}; use at least that"
            )


class EBM(Method):
    """An encoder whose features determine the density of an image.

    The energy is a perceptron on the features with one smooth hidden layer: where the encoder is
    piecewise linear, its biases reach the gradient of the energy, and with it the score, through
    the curvature of the head alone. The last layer has no bias: no score depends on it, and NCE
    learns it as the normaliser.

    An energy is a function of one image. Batch norm, if any, is therefore in evaluation mode, and
    its averages come from an extra pass over the data, never over samples.

    Departs:
        mcmc: JEM's settings, with a scalar head instead of class scores; samples are clamped to the
        range of pixels, as in IGEBM, which adds noise before the gradient step, not after.
        nce: the model is p_n(x) exp(-E(x) - c), relative to the noise's density, so its energy over
        images is E - log p_n. Otherwise the network would first have to learn log p_n to within a
        nat: 3,610 +- 870 for CIFAR-10 images, 3,150 +- 40 for the noise.
        conditional_nce: Gaussian noise of many levels, as in score matching, and turns: the
        conditional density of either is symmetric, as the loss requires. Turns alone only fit the
        ratios of p(x) among the four turns of an image.
    """

    Config = EBMConfig

    def __init__(self, config: EBMConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        self.backbone = backbone
        width = config.hidden_dim
        self.head = nn.Sequential(
            nn.Linear(backbone.embed_dim, width), nn.SiLU(), nn.Linear(width, 1, bias=False)
        )
        self._has_batch_norm = any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()
        )
        size_px = data.view_sizes_px[0]
        # A score has the length of the noise, sqrt(D): the head need not grow to that first.
        self._gain = math.sqrt(3) * size_px if config.training == "score_matching" else 1.0
        self.buffer: ReplayBuffer | None = None
        self.noise: SpectralGaussian | None = None
        if config.training == "mcmc":
            self.buffer = ReplayBuffer(config.buffer_length, size_px, config.value_range)
        elif config.training == "nce":
            self.noise = SpectralGaussian(size_px)
            self.log_normaliser = nn.Parameter(torch.zeros(()))
        self._finished_chains: tuple[ChainStarts, Tensor] | None = None
        self._last_images: Tensor | None = None

    @property
    def encoder(self) -> Backbone:
        """The backbone without the energy's head."""
        return self.backbone

    def energy(self, images: Tensor) -> Tensor:
        """Return E of each image, ``(N,)`` float32, of ``(N, 3, S, S)``."""
        return self._energy_and_features(images)[0]

    def _energy_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.head(at_least_float32(features)).squeeze(1) * self._gain, features

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Return the loss of the configured training; the features are those of its data."""
        images = batch.views[0]
        if self._has_batch_norm and self.training:
            # Updates its averages; with gradients, because autocast caches the casts of weights.
            self.backbone(images)
        with evaluation_mode(self.backbone):
            if self.buffer is not None:
                return self._mcmc(images, self.buffer, progress)
            if self.noise is not None:
                return self._nce(images, self.noise, progress)
            if self.config.training == "conditional_nce":
                return self._conditional_nce(images, progress)
            return self._score_matching(images, progress)

    @property
    def _scale(self) -> float:
        """Normalised units for 1 unit of the settings, which assume values in [-1, 1]."""
        low, high = self.config.value_range
        return (high - low) / 2

    @property
    def _log_noise_range(self) -> tuple[float, float]:
        low, high = self.config.noise_std_range
        return math.log(low * self._scale), math.log(high * self._scale)

    def _mcmc(self, images: Tensor, buffer: ReplayBuffer, progress: Progress) -> LossOutput:
        config, scale = self.config, self._scale
        generator = progress.shared_generator()
        starts = buffer.starts(len(images), restart_prob=config.restart_prob, generator=generator)
        data = images + config.input_noise_std * scale * torch.randn_like(images)
        start_images = starts.images.to(images)
        if config.restart_from != "noise":
            fresh = data if config.restart_from == "data" else self._perturb(data)[0]
            start_images = torch.where(per_image(starts.fresh), fresh, start_images)
        samples, gradients = langevin(
            self.energy,
            start_images,
            num_steps=config.langevin_steps,
            step_size=config.langevin_step_size * scale**2,
            max_gradient=(config.langevin_max_gradient or math.inf) / scale,
            noise_std=config.langevin_noise_std * scale,
            value_range=config.value_range,
        )
        self._finished_chains = (starts, samples)
        energies, features = self._energy_and_features(torch.cat([data, samples]))
        data_energies, sample_energies = energies.split(len(images))
        loss = contrastive_divergence_loss(
            data_energies, sample_energies, regularisation=config.energy_regularisation
        )
        features = features[: len(images)].detach()
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        metrics = contrast(data_energies, sample_energies, "samples") | {
            "ebm/sample_gradient_norm": gradients.mean() * scale,
            "ebm/sample_moved_rms": (samples - start_images).square().mean().sqrt() / scale,
            "ebm/chain_length_steps": starts.num_steps.float().mean() + config.langevin_steps,
        }
        return LossOutput(loss, features, {key: v.detach() for key, v in metrics.items()})

    def _score_matching(self, images: Tensor, progress: Progress) -> LossOutput:
        low, high = self._log_noise_range
        sigma = torch.empty_like(images[:, 0, 0, 0]).uniform_(low, high).exp()
        noise = torch.randn_like(images)
        outputs: list[tuple[Tensor, Tensor]] = []

        def energy(noisy: Tensor) -> Tensor:
            outputs.append(self._energy_and_features(noisy))
            return outputs[0][0] / sigma

        noisy = images + per_image(sigma) * noise
        with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            scores = -energy_gradient(energy, noisy, create_graph=torch.is_grad_enabled())
        energies, features = outputs[0]
        loss = denoising_score_loss(scores, noise, sigma)
        if not progress.is_logged:
            return LossOutput(loss, features.detach(), {})
        with torch.no_grad():
            residual = (per_image(sigma) * scores + noise).square().flatten(1).mean(dim=1)
            fine = sigma < math.exp((low + high) / 2)
            metrics = {
                "ebm/energy_data": energies.mean(),
                "ebm/energy_std": energies.std(correction=0),
                "ebm/score_length": (per_image(sigma) * scores).square().mean().sqrt(),
                "ebm/noise_left_fine": mean_where(fine, residual),
                "ebm/noise_left_coarse": mean_where(~fine, residual),
            }
        return LossOutput(loss, features.detach(), metrics)

    def _nce(self, images: Tensor, model: SpectralGaussian, progress: Progress) -> LossOutput:
        n, count = len(images), self.config.num_noise
        with torch.autocast(images.device.type, enabled=False):
            noise = model.sample(n * count).to(images)
            log_noise = model.log_prob(images)
        energies, features = self._energy_and_features(torch.cat([images, noise]))
        # p(x) = p_n(x) exp(-E(x) - c): the noise's density, some thousand nats, cancels exactly.
        data_logits, noise_logits = (-energies - self.log_normaliser).split([n, n * count])
        loss = noise_contrastive_loss(
            data_logits,
            noise_logits.view(n, count),
            data_log_noise=torch.zeros_like(data_logits),
            noise_log_noise=torch.zeros_like(noise_logits).view(n, count),
            num_noise=count,
        )
        self._last_images = images
        if not progress.is_logged:
            return LossOutput(loss, features[:n].detach(), {})
        metrics = contrast(energies[:n], energies[n:], "noise") | {
            "ebm/right_data": (data_logits > math.log(count)).float().mean(),
            "ebm/right_noise": (noise_logits < math.log(count)).float().mean(),
            "ebm/log_normaliser": self.log_normaliser.clone(),
            "ebm/nats_per_value": -(log_noise + data_logits).mean() / images[0].numel(),
        }
        features = features[:n].detach()
        return LossOutput(loss, features, {key: v.detach() for key, v in metrics.items()})

    def _perturb(self, images: Tensor) -> tuple[Tensor, Tensor]:
        least, most = self.config.noise_std_range
        return perturb(images, self.config.perturbations, (least * self._scale, most * self._scale))

    def _conditional_nce(self, images: Tensor, progress: Progress) -> LossOutput:
        n, count, names = len(images), self.config.num_noise, self.config.perturbations
        noise, kinds = self._perturb(images.repeat_interleave(count, dim=0))
        energies, features = self._energy_and_features(torch.cat([images, noise]))
        data_energies, noise_energies = energies[:n], energies[n:].view(n, count)
        loss = conditional_noise_contrastive_loss(-data_energies, -noise_energies)
        if not progress.is_logged:
            return LossOutput(loss, features[:n].detach(), {})
        is_correct = (noise_energies > data_energies[:, None]).flatten().float()
        metrics = contrast(data_energies, noise_energies, "noise")
        for name in names:
            metrics[f"ebm/right_{name}"] = mean_where(kinds == names.index(name), is_correct)
        features = features[:n].detach()
        return LossOutput(loss, features, {key: v.detach() for key, v in metrics.items()})

    @torch.no_grad()
    def after_optimizer_step(self, progress: Progress) -> None:
        """Put all ranks' samples into the buffer, or fit the noise to their images."""
        if self.buffer is not None and self._finished_chains is not None:
            starts, samples = self._finished_chains
            self.buffer.put(starts, samples, num_steps=self.config.langevin_steps)
        if self.noise is not None and self._last_images is not None:
            self.noise.fit_(self._last_images)
        self._finished_chains = self._last_images = None

    def pictures(self, batch: Batch, progress: Progress) -> Mapping[str, ImageGrid]:
        """Show samples of the chains, denoised images, or data and noise."""
        with torch.inference_mode(False), evaluation_mode(self.backbone):
            images = batch.views[0].clone()
            if self.buffer is not None:
                return {"samples": self._picture_of_samples(self.buffer)}
            if self.config.training in ("nce", "conditional_nce"):
                return {"data_and_noise": self._picture_of_noise(images)}
            return {"denoised": self._picture_of_denoising(images)}

    def _picture_of_samples(self, buffer: ReplayBuffer) -> ImageGrid:
        side = max(1, min(_SHOWN_ROWS, math.isqrt(len(buffer.num_steps))))
        slots = buffer.num_steps.argsort(descending=True)[: side * side]
        samples, steps = buffer.samples[slots].float(), buffer.num_steps[slots]
        with torch.no_grad():
            energies = self.energy(samples)
        caption = (
            f"Samples of the oldest Langevin chains, {int(steps.min()):,} to "
            f"{int(steps.max()):,} steps after their start from {self.config.restart_from}; "
            f"their energies are {range_text(energies)}."
        )
        return ImageGrid(samples.unflatten(0, (side, side)), (), caption)

    def _picture_of_denoising(self, images: Tensor) -> ImageGrid:
        images = images[:_SHOWN_ROWS]
        sigma = torch.linspace(*self._log_noise_range, len(images)).exp().to(images)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(images.shape, generator=generator).to(images)
        noisy = images + per_image(sigma) * noise
        # The energy at noise level sigma is E / sigma, so sigma^2 times its score is:
        denoised = noisy - per_image(sigma) * energy_gradient(self.energy, noisy)
        errors = [float((x - images).square().mean().sqrt()) for x in (noisy, denoised)]
        caption = (
            f"One step along the score, x + sigma^2 s(x), from noise of {float(sigma[0]):.2g} to "
            f"{float(sigma[-1]):.2g}. Root mean square error {errors[0]:.2f} before, "
            f"{errors[1]:.2f} after."
        )
        grid = torch.stack([noisy, denoised, images], dim=1)
        return ImageGrid(grid, ("with noise", "denoised", "original"), caption)

    @torch.no_grad()
    def _picture_of_noise(self, images: Tensor) -> ImageGrid:
        images = images[:_SHOWN_ROWS]
        noise = self._perturb(images)[0]
        noise_text = f"noise derived from them ({', '.join(self.config.perturbations)})"
        if self.noise is not None:
            noise = self.noise.sample(len(images)).to(images)
            noise_text = "Gaussian noise with their spectrum and colours"
        caption = (
            f"Data, of energies {range_text(self.energy(images))}, and {noise_text}, "
            f"of energies {range_text(self.energy(noise))}."
        )
        return ImageGrid(torch.stack([images, noise], dim=1), ("data", "noise"), caption)


METHOD = EBM
