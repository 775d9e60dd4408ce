"""Context encoders.

D. Pathak, P. Krahenbuhl, J. Donahue, T. Darrell, A. A. Efros: "Context Encoders: Feature Learning
by Inpainting", 2016, arXiv:1604.07379v2. The authors' code: train.lua (centre) and train_random.lua
(random regions).
"""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from raysl.config.base import Idle, NonNegativeFloat, PositiveFloat, PositiveInt
from raysl.errors import ConfigError, ShapeError
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
from raysl.nn.decoders import LEAK, Discriminator, UpConvDecoder
from raysl.nn.precision import at_least_float32

MIN_VIEW_PX = 16
REGION_CELLS = 8  # train_random.lua: 0.06 cells per pixel at 128 px


def central_mask(n: int, size_px: int, *, share: float, device: torch.device) -> Tensor:
    """Return ``(N, 1, S, S)`` bool, true in one square in the middle with this share of the area.

    Source: Sec. 3.3 (a).
    """
    side = hole_size_px(size_px, share)
    start = (size_px - side) // 2
    mask = torch.zeros(n, 1, size_px, size_px, dtype=torch.bool, device=device)
    mask[:, :, start : start + side, start : start + side] = True
    return mask


def hole_size_px(size_px: int, share: float) -> int:
    """Return the side of a square with a share of a view's area: half the view's for 1/4."""
    return max(1, round(size_px * math.sqrt(share)))


def block_mask(
    n: int, size_px: int, *, share: float, num_blocks: int, device: torch.device
) -> Tensor:
    """Return ``(N, 1, S, S)`` bool, true in random squares that may overlap.

    Each covers ``share / num_blocks`` of the view (rounded down to pixels), so that together they
    cover at most ``share``. Their positions are drawn from torch's global generator.

    Source: Sec. 3.3 (b): "up to 1/4 of the image".
    """
    side = max(1, int(size_px * math.sqrt(share / num_blocks)))
    starts = torch.randint(size_px - side + 1, (2, n, num_blocks, 1), device=device)
    pixel = torch.arange(size_px, device=device)
    inside = (pixel >= starts) & (pixel < starts + side)  # (2, N, B, S)
    blocks = inside[0][:, :, :, None] & inside[1][:, :, None, :]  # (N, B, S, S)
    return blocks.any(dim=1, keepdim=True)


def region_mask(n: int, size_px: int, *, share: float, device: torch.device) -> Tensor:
    """Return ``(N, 1, S, S)`` bool, true in random shapes that cover a share of each view.

    Smooth noise, from torch's global generator, is cut at the level that leaves this share of the
    pixels of each image below it (ties aside).

    Source: train_random.lua: noise of 0.06 cells per pixel, enlarged bicubically, is cut at a fixed
    level, and patterns that cover 20 to 30 % are kept.
    Departs: Sec. 3.3 (c) takes outlines of objects from PASCAL VOC 2012, deformed and laid on other
    images; the authors published the above instead, and so do we. Here the share is exact, cells
    scale with the view, and each image has a mask of its own, not one for the batch.
    """
    noise = torch.rand(n, 1, REGION_CELLS, REGION_CELLS, device=device)
    smooth = F.interpolate(noise, size=(size_px, size_px), mode="bicubic").flatten(1)
    level = smooth.kthvalue(max(1, round(share * size_px**2)), dim=1, keepdim=True).values
    return (smooth <= level).view(n, 1, size_px, size_px)


def reconstruction_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    r"""Compute the weighted squared error over the number of positions with a weight.

    .. math::
        L_{rec}(x) = \| \hat M \odot (x - F((1 - \hat M) \odot x)) \|_2^2

    Args:
        prediction: ``(N, C, S, S)``, any float dtype.
        target: Same shape.
        weight: ``(N, 1, S, S)``: M, 0 outside of the prediction; 10 in the overlap.

    Returns:
        Scalar >= 0, float32 (float64 for float64 inputs), the mean over images. Where all weights
        are 1 it is the mean squared error.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Eq. (1), normalised by the mask's size ("normalized masked L2 distance").
    """
    if prediction.shape != target.shape or weight.shape != target[:, :1].shape:
        raise ShapeError(
            "prediction and target must be (N, C, S, S) and weight (N, 1, S, S); got "
            f"{tuple(prediction.shape)}, {tuple(target.shape)}, {tuple(weight.shape)}"
        )
    with torch.autocast(target.device.type, enabled=False):
        error = at_least_float32(prediction) - at_least_float32(target)
        weighted = (error.square() * weight).flatten(1).sum(dim=1)
        num_weighted = (weight > 0).flatten(1).sum(dim=1) * target.shape[1]
        return (weighted / num_weighted.clamp_min(1)).mean()


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Return - log D(x) - log(1 - D(F(x))), the mean over ``(N,)`` logits of each kind.

    Chance (logits 0) gives 2 log 2.

    Source: Eq. (2), negated to be minimised, as in train.lua.
    """
    with torch.autocast(real.device.type, enabled=False):
        return (
            F.softplus(-at_least_float32(real)).mean()
            + F.softplus(at_least_float32(generated)).mean()
        )


def adversarial_loss(generated: Tensor) -> Tensor:
    """Return - log D(F(x)), the mean over ``(N,)`` logits; chance gives log 2.

    Departs: Eq. (2) has log(1 - D(F(x))), whose gradient vanishes while the discriminator wins; the
    authors' train.lua has this form, as GANs do in practice.
    """
    with torch.autocast(generated.device.type, enabled=False):
        return F.softplus(-at_least_float32(generated)).mean()


class ContextEncoderConfig(MethodConfig):
    """Settings of context encoders."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("num_blocks",), {"mask": ("centre", "region")}),
        Idle(("overlap", "overlap_weight"), {"mask": ("blocks", "region")}),
        Idle(("overlap_weight",), {"mask": ("centre",), "overlap": (0,)}),
        Idle(("discriminator_width",), {"adversarial_weight": (0,)}),
    )
    name: Literal["context_encoder"] = "context_encoder"
    mask: Literal["centre", "blocks", "region"] = "centre"
    """The region to remove (sec. 3.3): a central square, random squares, or random shapes. In the
    paper, features from random regions transfer better."""
    masked_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Share of the view's area that is removed: 1/4 in the paper."""
    num_blocks: PositiveInt = 4
    """Number of squares for mask: blocks, which share masked_share; not stated in the paper."""
    overlap: Annotated[float, Field(ge=0.0, lt=0.25)] = 4 / 128
    """For mask: centre, how far the predicted square extends beyond the hole on each side, over the
    view's side; there the network sees its target (overlapPred=4 at 128 px)."""
    overlap_weight: PositiveFloat = 10.0
    """Weight of the squared error in that ring (train.lua)."""
    reconstruction_weight: NonNegativeFloat = 0.999
    """lambda_rec of eq. (3)."""
    adversarial_weight: NonNegativeFloat = 0.001
    """lambda_adv of eq. (3); 0 removes the discriminator. Views here are normalised, about twice as
    wide as the authors' [-1, 1], so their squared error is four times as large."""
    bottleneck_dim: PositiveInt = 4000
    """Width between encoder and decoder (README of the authors' code)."""
    decoder_width: PositiveInt = 64
    """Channels of the decoder's last hidden layer (ngf)."""
    discriminator_width: PositiveInt = 64
    """Channels of the discriminator's first layer (ndf)."""

    @property
    def has_adversary(self) -> bool:
        """Whether the discriminator's loss has a weight."""
        return self.adversarial_weight > 0

    @property
    def norms_images(self) -> bool:
        """True: there is batch norm after the encoder."""
        return True

    @property
    def num_views(self) -> int:
        """One view, from which the method removes a region."""
        return 1

    def check(self, shape: RunShape) -> None:
        """Reject views too small for a hole and its surroundings, and settings without any loss."""
        view = shape.view_sizes_px[0]
        if view < MIN_VIEW_PX:
            raise ConfigError(
                f"data.views.size_px={view}: method context_encoder needs views of {MIN_VIEW_PX} "
                f"px or more"
            )
        hole = hole_size_px(view, self.masked_share)
        if self.mask == "centre" and 2 * round(self.overlap * view) >= hole:
            raise ConfigError(
                f"method.overlap={self.overlap:g} leaves nothing of a hole of {hole} px in views "
                f"of {view} px; use less than {hole / 2 / view:.3f}"
            )
        if self.reconstruction_weight + self.adversarial_weight == 0:
            raise ConfigError(
                "method.reconstruction_weight and method.adversarial_weight are both 0; the "
                "paper has 0.999 and 0.001"
            )


class _Hole(NamedTuple):
    """The region removed from each view, and the region to predict."""

    masked: Tensor  # (N, 1, S, S) bool: hidden from the network
    weight: Tensor  # (N, 1, s, s) float: weight of the squared error in the predicted window
    start: int  # first row and column of the predicted window in the view
    size: int  # its side s


class ContextEncoder(Method):
    """An encoder sees a view with a hole, a decoder fills it, a discriminator judges the result.

    Departs: The encoder is any backbone, so its pooled features go to the decoder; the paper's
    AlexNet has a channel-wise layer there. Both networks step at the same time, each by the
    gradient of the same forward pass; train.lua steps the discriminator first. For random masks the
    squared error is over the hole, as eq. (1) says; train_random.lua takes the whole image.
    """

    Config = ContextEncoderConfig
    loss_is_mean_over_images = True

    def __init__(self, config: ContextEncoderConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        self.backbone = backbone
        view = data.view_sizes_px[0]
        size = hole_size_px(view, config.masked_share) if config.mask == "centre" else view
        self.bottleneck = nn.Sequential(
            nn.Linear(backbone.embed_dim, config.bottleneck_dim, bias=False),
            nn.BatchNorm1d(config.bottleneck_dim),
            nn.LeakyReLU(LEAK, inplace=True),
        )
        self.decoder = UpConvDecoder(
            config.bottleneck_dim, size_px=size, width=config.decoder_width
        )
        self.discriminator = (
            Discriminator(size_px=size, width=config.discriminator_width)
            if config.adversarial_weight > 0
            else None
        )

    @property
    def encoder(self) -> Backbone:
        """The backbone without the decoder."""
        return self.backbone

    @property
    def adversary(self) -> nn.Module | None:
        """The discriminator."""
        return self.discriminator

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Remove regions, predict them, and compute the loss (eq. (3)).

        The features are those of the views with holes.
        """
        images = batch.views[0]
        hole = self._hole(images)
        features, painted = self._paint(images, hole)
        target = _window(images, hole)
        reconstruction = reconstruction_loss(painted, target, hole.weight)
        is_predicted = (hole.weight > 0).to(target.dtype)
        metrics: dict[str, Tensor] = {}
        if progress.is_logged:
            error = ((painted.detach().to(target.dtype) - target) * is_predicted).square().sum()
            metrics = {
                "context_encoder/reconstruction_loss": reconstruction.detach(),
                # 1: no better than the mean colour, which is 0 in normalised views.
                "context_encoder/relative_error": error
                / (target * is_predicted).square().sum().clamp_min(1e-6),
            }
        loss = self.config.reconstruction_weight * reconstruction
        if self.discriminator is None:
            return LossOutput(loss, features.detach(), metrics)
        # The discriminator only sees the predicted region (with context it would only look at the
        # border of the hole, sec. 3.2); around random shapes, real and generated images are both 0.
        fake = painted * is_predicted
        adversarial = adversarial_loss(_judge_frozen(self.discriminator, fake))
        real_logits = self.discriminator(target * is_predicted)
        generated_logits = self.discriminator(fake.detach())
        if progress.is_logged:
            metrics |= {
                "context_encoder/adversarial_loss": adversarial.detach(),
                "context_encoder/real_judged_real": (real_logits > 0).float().mean(),
                "context_encoder/painted_judged_real": (generated_logits > 0).float().mean(),
            }
        return LossOutput(
            loss + self.config.adversarial_weight * adversarial,
            features.detach(),
            metrics,
            adversary_loss=discriminator_loss(real_logits, generated_logits),
        )

    def _hole(self, images: Tensor) -> _Hole:
        """Draw the holes of a batch."""
        config, n, size, device = self.config, len(images), images.shape[2], images.device
        if images.shape[2] != images.shape[3]:
            raise ShapeError(f"views must be (N, 3, S, S); got {tuple(images.shape)}")
        share = config.masked_share
        if config.mask == "blocks":
            blocks = config.num_blocks
            masked = block_mask(n, size, share=share, num_blocks=blocks, device=device)
            return _Hole(masked, masked.to(images.dtype), 0, size)
        if config.mask == "region":
            masked = region_mask(n, size, share=share, device=device)
            return _Hole(masked, masked.to(images.dtype), 0, size)
        square = central_mask(n, size, share=share, device=device)
        side, ring = hole_size_px(size, share), round(config.overlap * size)
        start = (size - side) // 2
        masked = torch.zeros_like(square)
        inner = slice(start + ring, start + side - ring)
        masked[:, :, inner, inner] = True
        weight = torch.where(masked, 1.0, config.overlap_weight) * square
        end = start + side
        return _Hole(masked, weight[:, :, start:end, start:end].to(images.dtype), start, side)

    def _paint(self, images: Tensor, hole: _Hole) -> tuple[Tensor, Tensor]:
        """Return the features of the views with holes, and the prediction for the window."""
        # 0 is the mean colour of normalised views.
        features = self.backbone(images.masked_fill(hole.masked, 0.0))
        return features, self.decoder(self.bottleneck(features), hole.size)

    @torch.no_grad()
    def pictures(self, batch: Batch, progress: Progress) -> Mapping[str, ImageGrid]:
        """Show views, views with holes, and the predictions in the holes."""
        images = batch.views[0]
        hole = self._hole(images)
        _, painted = self._paint(images, hole)
        margin = images.shape[2] - hole.start - hole.size
        whole = F.pad(painted.to(images.dtype), (hole.start, margin) * 2)
        visible = images.masked_fill(hole.masked, 0.0)
        filled = torch.where(hole.masked, whole, images)
        grid = torch.stack([images, visible, filled], dim=1)
        caption = "A view; what the encoder sees; what the decoder paints into the hole."
        return {"inpainting": ImageGrid(grid, ("view", "with a hole", "painted"), caption)}


def _window(images: Tensor, hole: _Hole) -> Tensor:
    """Crop the predicted window from the views, ``(N, 3, s, s)``."""
    inside = slice(hole.start, hole.start + hole.size)
    return images[:, :, inside, inside]


def _judge_frozen(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Return the discriminator's logits with gradients to the images, not to its parameters.

    Its buffers (batch norm) are copied, so that this pass does not change them.
    """
    state = {name: p.detach() for name, p in discriminator.named_parameters()}
    state |= {name: b.clone() for name, b in discriminator.named_buffers()}
    return functional_call(discriminator, state, (images,))  # type: ignore[no-any-return]


METHOD = ContextEncoder
