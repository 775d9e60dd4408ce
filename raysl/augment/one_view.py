"""View recipes with one view, for methods that compare no views and for supervised training."""

from typing import Literal

from pydantic import model_validator

from raysl.augment.crop import Interpolation
from raysl.augment.ops import Flip, Grey, Op
from raysl.augment.pipeline import Recipe, View
from raysl.config.base import Fraction, PositiveInt, Probability


class MAEViews(Recipe):
    """One view: crop and flip.

    Source: He et al. 2021, arXiv:2111.06377v3, appendix A.1, table 8, and the authors'
    main_pretrain.py:124 (bicubic).
    """

    recipe: Literal["mae"] = "mae"
    interpolation: Interpolation = "bicubic"
    min_scale: Fraction = 0.2
    """Smallest area of a crop over the area of the image."""

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = self.crop((self.min_scale, 1.0))
        return (View(size_px=self.size_px, crop=crop, ops=(Flip(),)),)


class FinetuneViews(Recipe):
    """One view for training with labels or a teacher: crop and flip.

    Source: Chen et al. 2020, arXiv:2006.10029v2 (SimCLR v2), sec. 3.1, for fine-tuning and
    distillation; the crops are those of pretraining, 8 to 100 % of the area, bicubic (the authors'
    tf2/data_util.py:298).
    """

    recipe: Literal["finetune"] = "finetune"
    interpolation: Interpolation = "bicubic"
    min_scale: Fraction = 0.08
    """Smallest area of a crop over the area of the image."""
    flip_prob: Probability = 0.5
    """Probability of mirroring an image: 0 where left and right matter, as for digits."""

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = self.crop((self.min_scale, 1.0))
        ops = (Flip(prob=self.flip_prob),) if self.flip_prob > 0 else ()
        return (View(size_px=self.size_px, crop=crop, ops=ops),)


class RotationViews(Recipe):
    """One upright view: a random crop, or a shifted image with a border, and flip.

    The method rotates it by quarter turns itself, on the device: this is lossless and yields the
    labels.

    Source: Gidaris et al. 2018, arXiv:1803.07728v1, and the authors' FeatureLearningRotNet: crops
    of 8 to 100 % for ImageNet (config/ImageNet_RotNet_AlexNet.py:9, dataloader.py:105), a border of
    4 pixels for CIFAR-10 (dataloader.py:152). VISSL's rotnet_8gpu_resnet.yaml:21 crops in the same
    way on ImageNet.
    Departs: VISSL rotates before it mirrors, so left and right turns look alike; here, as in the
    authors' code, the image is mirrored first.
    """

    recipe: Literal["rotation"] = "rotation"
    min_scale: Fraction = 0.08
    """Smallest area of a crop over the area of the image."""
    pad: Fraction | None = None
    """Instead of cropping by area: add a black border of this width over the image's short side,
    and crop a square of that side anywhere (0.125 for CIFAR-10: 4 of 32 px)."""

    @model_validator(mode="after")
    def _check_crop(self) -> "RotationViews":
        default = type(self).model_fields["min_scale"].default
        if self.pad is not None and self.min_scale != default:
            raise ValueError(
                f"pad={self.pad:g} cuts squares of the whole side, so min_scale={self.min_scale:g} "
                f"has no effect; leave one of them out"
            )
        return self

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = self.crop((self.min_scale, 1.0))
        if self.pad is not None:
            crop = self.crop(short_side=(1.0, 1.0), pad=self.pad)
        return (View(size_px=self.size_px, crop=crop, ops=(Flip(),)),)


class JigsawViews(Recipe):
    """One view that the method cuts into tiles: nearly the whole image, flip, mostly grey.

    Source: Noroozi and Favaro 2016, arXiv:1603.09246v3, and VISSL's jigsaw_8gpu_resnet.yaml: 255
    pixels of a short side of 256, and two images of three are grey.
    """

    recipe: Literal["jigsaw"] = "jigsaw"
    size_px: PositiveInt = 255
    grey_prob: Probability = 0.66
    """Probability of turning an image grey."""

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = self.crop(short_side=(255 / 256, 255 / 256))
        ops: tuple[Op, ...] = (Flip(), Grey(prob=self.grey_prob))
        return (View(size_px=self.size_px, crop=crop, ops=ops),)


class ContextEncoderViews(Recipe):
    """One view from which the method removes a region: a small square of the image, and flip.

    Source: Pathak et al. 2016, arXiv:1604.07379, and the authors' train.lua: a square of 128 pixels
    from a short side of 350.
    """

    recipe: Literal["context_encoder"] = "context_encoder"
    size_px: PositiveInt = 128
    short_side: tuple[Fraction, Fraction] = (128 / 350, 128 / 350)
    """Range of the square's side over the image's short side; (1, 1) for images as small as
    CIFAR-10's."""

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = self.crop(short_side=self.short_side)
        return (View(size_px=self.size_px, crop=crop, ops=(Flip(),)),)
