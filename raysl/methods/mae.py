"""MAE.

K. He, X. Chen, S. Xie, Y. Li, P. Dollar, R. Girshick: "Masked Autoencoders Are Scalable Vision
Learners", 2021, arXiv:2111.06377v3.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysl.config.base import Idle, PositiveInt
from raysl.errors import ShapeError
from raysl.methods.base import (
    Batch,
    ImageGrid,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.precision import at_least_float32
from raysl.nn.vit import TransformerBlock, VisionTransformer, sincos_positions

TARGET_EPS = 1e-6  # added to a patch's variance in the authors' code
MAX_PICTURES = 8


def patchify(images: Tensor, *, patch_size: int) -> Tensor:
    """Split images into patches, in reading order.

    Args:
        images: ``(N, 3, H, W)``, any dtype.
        patch_size: P in pixels; divides H and W.

    Returns:
        ``(N, L, P * P * 3)``: a patch's pixels row by row, the channels of a pixel side by side.

    Raises:
        ShapeError: If the images are not ``(N, 3, H, W)`` or do not divide into patches.

    Source: The authors' models_mae.py, which fixes the order.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] % patch_size or shape[3] % patch_size:
        raise ShapeError(
            f"images must be (N, 3, H, W) with H and W multiples of patch_size={patch_size}; "
            f"got {shape}"
        )
    n, _, height, width = shape
    grid = images.reshape(n, 3, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch_size**2 * 3)


def unpatchify(patches: Tensor, *, patch_size: int, rows: int) -> Tensor:
    """Reassemble images from patches, the inverse of :func:`patchify`.

    Args:
        patches: ``(N, L, P * P * 3)``.
        patch_size: P in pixels.
        rows: Patches from top to bottom.

    Returns:
        ``(N, 3, H, W)`` with H = rows * P.
    """
    n, length, _ = patches.shape
    grid = patches.reshape(n, rows, length // rows, patch_size, patch_size, 3)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, 3, rows * patch_size, -1)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor, *, normalize: bool) -> Tensor:
    r"""Compute the mean squared error over the removed patches.

    .. math::
        L = \frac{1}{\sum_{n,l} m_{nl}} \sum_{n,l} m_{nl} \frac{1}{D} \|\hat x_{nl} - x_{nl}\|^2

    Args:
        prediction: ``(N, L, D)``, any float dtype.
        target: The patches, ``(N, L, D)``.
        mask: ``(N, L)``, 1 where a patch was removed, 0 where the encoder saw it.
        normalize: Subtract each target patch's mean and divide by its standard deviation.

    Returns:
        Scalar float32 >= 0 (float64 for float64). Predicting 0 for normalised patches gives (D - 1)
        / D, as their variance is the unbiased one.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Sec. 3, "Reconstruction target", and the authors' forward_loss. In float32, also under
        autocast.
    """
    if prediction.ndim != 3 or prediction.shape != target.shape or mask.shape != target.shape[:2]:
        raise ShapeError(
            f"prediction and target must be (N, L, D) and mask (N, L); got "
            f"{tuple(prediction.shape)}, {tuple(target.shape)}, {tuple(mask.shape)}"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        predicted, wanted = at_least_float32(prediction), at_least_float32(target)
        if normalize:
            wanted = _normalised(wanted)
        error = (predicted - wanted).square().mean(dim=2)  # (N, L)
        weights = mask.to(error.dtype)
        return (error * weights).sum() / weights.sum()


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return each patch's mean and standard deviation, ``(N, L, 1)``."""
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return mean, (variance + TARGET_EPS).sqrt()


def _normalised(patches: Tensor) -> Tensor:
    mean, std = _moments(patches)
    return (patches - mean) / std


class Masking(NamedTuple):
    """The visible and the removed patches of each image."""

    visible: Tensor
    """``(N, T)`` int64: indices of the visible patches, in random order."""
    restore: Tensor
    """``(N, L)`` int64: each patch's index in the sequence of visible, then removed ones."""
    mask: Tensor
    """``(N, L)`` float32: 1 removed, 0 visible."""


def mask_by_noise(noise: Tensor, *, mask_ratio: float) -> Masking:
    """Keep the patches with the least noise.

    Args:
        noise: ``(N, L)``, uniform.
        mask_ratio: Share of patches to remove, above 0 and below 1; at least one stays.

    Source: Sec. 3, "Simple implementation"; the number of visible patches is rounded down, as
    there.
    """
    length = noise.shape[1]
    # Guards against rounding: 100 * (1 - 0.9) is 9.999999999999998.
    keep = max(1, int(length * (1 - mask_ratio) + 1e-9))
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    return Masking(order[:, :keep], restore, (restore >= keep).float())


class MAEConfig(MethodConfig):
    """Settings of MAE; the backbone is a vision transformer."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("decoder_heads",), {"decoder_depth": (0,)}),)
    name: Literal["mae"] = "mae"
    needs_vit: ClassVar[bool] = True
    finetuned_pool: ClassVar[str | None] = "mean_norm"  # the authors' FINETUNE.md: --global_pool
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    """Share of patches to remove (sec. 4.1, fig. 5)."""
    normalize_targets: bool = True
    """Predict each patch's pixels minus their mean, over their standard deviation (table 1d)."""
    decoder_dim: PositiveInt = 512
    """Width of the decoder, a multiple of 4 and of decoder_heads (table 1b)."""
    decoder_depth: Annotated[int, Field(ge=0)] = 8
    """Blocks of the decoder (table 1a)."""
    decoder_heads: PositiveInt = 16
    """Number of attention heads of a block (the authors' models_mae.py)."""

    @model_validator(mode="after")
    def _width_fits(self) -> "MAEConfig":
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_dim={self.decoder_dim} must be a multiple of 4 and of "
                f"decoder_heads={self.decoder_heads}"
            )
        return self

    @property
    def num_views(self) -> int:
        """One view; the method compares none."""
        return 1


class Decoder(nn.Module):
    """A small transformer over all patches, with a mask token for each removed one.

    Args:
        config: The method's settings, with the decoder's size.
        encoder_dim: Width of the encoder's tokens.
        patch_values: Number of values of a patch, P * P * 3.

    Source: Sec. 3, "MAE decoder", and appendix A.1: Xavier-uniform weights, fixed positions.
    """

    def __init__(self, config: MAEConfig, *, encoder_dim: int, patch_values: int) -> None:
        super().__init__()
        width = config.decoder_dim
        self.embed = nn.Linear(encoder_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, patch_values)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)
        self._positions: dict[tuple[int, int], Tensor] = {}

    def forward(self, tokens: Tensor, restore: Tensor, *, rows: int) -> Tensor:
        """Predict every patch.

        Args:
            tokens: ``(N, 1 + T, D)``, the class token and the visible patches.
            restore: ``(N, L)`` int64 (:class:`Masking`).
            rows: Patches from top to bottom.

        Returns:
            ``(N, L, P * P * 3)``.
        """
        n, length = restore.shape
        tokens = self.embed(tokens)
        missing = self.mask_token.to(tokens.dtype).expand(n, length + 1 - tokens.shape[1], -1)
        patches = _gather_tokens(torch.cat([tokens[:, 1:], missing], dim=1), restore)
        all_tokens = torch.cat([tokens[:, :1], patches], dim=1)
        all_tokens = all_tokens + self._positions_of(rows, length // rows).to(all_tokens)
        for block in self.blocks:
            all_tokens = block(all_tokens)
        return self.predict(self.norm(all_tokens))[:, 1:]  # type: ignore[no-any-return]

    def _positions_of(self, rows: int, columns: int) -> Tensor:
        """Return a grid's positions on the device; they follow from its size and are not saved."""
        device = self.mask_token.device
        positions = self._positions.get((rows, columns))
        if positions is None or positions.device != device:
            positions = sincos_positions(self.mask_token.shape[2], rows, columns).to(device)
            self._positions = {(rows, columns): positions}
        return positions


def _gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Gather each image's tokens by index: ``(N, L, D)``, ``(N, T)`` to ``(N, T, D)``."""
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))


class MAE(Method):
    """Predict the pixels of removed patches from the visible ones, by an encoder and a decoder.

    Departs: The encoder is initialised as configured; the authors' is as with backbone.init mae.
    """

    Config = MAEConfig
    loss_is_mean_over_images = True

    def __init__(self, config: MAEConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        self.backbone = backbone
        self.decoder = Decoder(
            config,
            encoder_dim=self.transformer.embed_dim,
            patch_values=3 * self.transformer.patch_size_px**2,
        )

    @property
    def encoder(self) -> Backbone:
        """The backbone without the decoder; evaluated on all patches."""
        return self.backbone

    @property
    def transformer(self) -> VisionTransformer:
        """The backbone's network."""
        net = self.backbone.net
        if not isinstance(net, VisionTransformer):
            raise ShapeError(f"MAE needs a VisionTransformer; got {type(net).__name__}")
        return net

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Return the error on the removed patches, drawn at random for each image."""
        images = batch.views[0]
        target = patchify(images, patch_size=self.transformer.patch_size_px)
        noise = torch.rand(target.shape[:2], device=images.device)
        masking = mask_by_noise(noise, mask_ratio=self.config.mask_ratio)
        tokens, prediction = self.rebuild(images, masking)
        normalize = self.config.normalize_targets
        loss = masked_mse(prediction, target, masking.mask, normalize=normalize)
        patches = tokens[:, 1:].mean(dim=1)
        features = tokens[:, 0] if self.transformer.pool == "cls" else patches
        metrics: dict[str, Tensor] = {}
        if progress.is_logged:
            metrics = self._health(loss.detach(), prediction, target, masking.mask)
        return LossOutput(loss, features.detach(), metrics)

    def rebuild(self, images: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """Encode the visible patches and predict all.

        Args:
            images: ``(N, 3, H, W)`` float, normalised.
            masking: The visible and the removed ones of their L patches.

        Returns:
            The encoder's tokens ``(N, 1 + T, D)`` and the prediction ``(N, L, P * P * 3)``.
        """
        net = self.transformer
        visible = _gather_tokens(net.embed_patches(images), masking.visible)
        tokens = net.encode(net.with_class_token(visible))
        rows = images.shape[2] // net.patch_size_px
        return tokens, self.decoder(tokens, masking.restore, rows=rows)

    @torch.no_grad()
    def _health(
        self, loss: Tensor, prediction: Tensor, target: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Return the improvement over constant grey, and the variation over patches and images."""
        wanted = at_least_float32(target)
        if self.config.normalize_targets:
            wanted = _normalised(wanted)
        weights = mask[:, :, None] / mask.sum()

        def variance(x: Tensor) -> Tensor:
            centre = (x * weights).sum(dim=(0, 1)).mean()
            return ((x - centre).square() * weights).sum(dim=(0, 1)).mean()

        total = variance(wanted).clamp_min(TARGET_EPS)
        predicted = at_least_float32(prediction)
        mean = (predicted * weights).sum(dim=(0, 1))  # the same for all patches
        spread = ((predicted - mean).square() * weights).sum(dim=(0, 1)).mean()
        return {
            "mae/explained_variance": 1 - loss / total,  # 0: no better than one grey
            "mae/prediction_spread": (spread / total).sqrt(),  # 0: the same patch everywhere
        }

    @torch.no_grad()
    def pictures(self, batch: Batch, progress: Progress) -> Mapping[str, ImageGrid]:
        """Show images, what the encoder saw of them, and the decoder's prediction."""
        images = batch.views[0][:MAX_PICTURES].float()
        size = self.transformer.patch_size_px
        patches = patchify(images, patch_size=size)
        noise = torch.rand(patches.shape[:2], generator=progress.shared_generator())
        masking = mask_by_noise(noise.to(images.device), mask_ratio=self.config.mask_ratio)
        predicted = self.rebuild(images, masking)[1].float()
        if self.config.normalize_targets:
            mean, std = _moments(patches)
            predicted = predicted * std + mean
        removed = masking.mask[:, :, None].bool()
        columns = {
            "image": patches,
            "visible": patches.masked_fill(removed, 0.0),
            "prediction": predicted,
            "combined": torch.where(removed, predicted, patches),
        }
        rows = images.shape[2] // size
        grid = [unpatchify(column, patch_size=size, rows=rows) for column in columns.values()]
        note = (
            " Each rebuilt patch has the true mean and spread: only its pattern is predicted."
            if self.config.normalize_targets
            else ""
        )
        return {
            "reconstruction": ImageGrid(
                torch.stack(grid, dim=1),
                tuple(columns),
                f"Images rebuilt from {1 - self.config.mask_ratio:.0%} of their patches.{note}",
            )
        }


METHOD = MAE
