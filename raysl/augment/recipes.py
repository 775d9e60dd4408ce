"""Views as papers define them, by name, with the knobs that people turn."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from raysl.augment.ops import Blur, ColorJitter, Flip, Fraction, Grey, Op, Solarise
from raysl.augment.pairs import PairViews
from raysl.augment.pipeline import Crop, View
from raysl.augment.random import MAX_VIEWS
from raysl.config.base import Config, Idle, NonNegativeFloat, PositiveInt, Probability


class _Recipe(Config):
    """What all recipes have."""

    size_px: PositiveInt = 224
    """Side of the views in pixels; of the large ones, where there are several sizes."""
    antialias: bool = True
    """Average over the pixels when a crop shrinks, as torchvision does; false is quicker."""


class SimCLRViews(_Recipe):
    """Two views of SimCLR: crop, flip, colour distortion, blur.

    Source: Chen et al. 2020, arXiv:2002.05709v3, appendix A (for CIFAR-10 B.9: strength 0.5, no
    blur).
    """

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("color_prob",), {"color_strength": (0,)}),)
    recipe: Literal["simclr"] = "simclr"
    min_scale: Fraction = 0.08
    """Smallest area of a crop over the area of the image."""
    color_strength: NonNegativeFloat = 1.0
    """s: jitter of 0.8 s in brightness, contrast and saturation, 0.2 s in hue."""
    color_prob: Probability = 0.8
    grey_prob: Probability = 0.2
    blur_prob: Probability = 0.5
    flip_prob: Probability = 0.5

    def views(self) -> tuple[View, ...]:
        """Return the two views' definition."""
        ops = _simclr_ops(
            self.color_strength,
            color_prob=self.color_prob,
            grey_prob=self.grey_prob,
            blur=Blur(prob=self.blur_prob),
            flip_prob=self.flip_prob,
        )
        crop = Crop(scale=(self.min_scale, 1.0), antialias=self.antialias)
        return (View(count=2, size_px=self.size_px, crop=crop, ops=ops),)


class MoCoV1Views(_Recipe):
    """Two views of MoCo v1: crop, grey, colour jitter always, flip.

    Source: He et al. 2019, arXiv:1911.05722v3, sec. 4.1, and the authors' main_moco.py.
    """

    recipe: Literal["moco_v1"] = "moco_v1"
    min_scale: Fraction = 0.2

    def views(self) -> tuple[View, ...]:
        """Return the two views' definition."""
        jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, prob=1.0)
        crop = Crop(scale=(self.min_scale, 1.0), antialias=self.antialias)
        ops: tuple[Op, ...] = (Grey(prob=0.2), jitter, Flip())
        return (View(count=2, size_px=self.size_px, crop=crop, ops=ops),)


class MoCoV2Views(_Recipe):
    """Two views of MoCo v2: crop, colour jitter, grey, blur, flip.

    Source: Chen et al. 2020, arXiv:2003.04297v1, sec. 3, and the authors' main_moco.py.
    Departs: A true Gaussian; the authors' PIL filter approximates it by boxes.
    """

    recipe: Literal["moco_v2"] = "moco_v2"
    min_scale: Fraction = 0.2
    blur_prob: Probability = 0.5
    flip_prob: Probability = 0.5

    def views(self) -> tuple[View, ...]:
        """Return the two views' definition."""
        ops: list[Op] = [
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, prob=0.8),
            Grey(prob=0.2),
        ]
        if self.blur_prob > 0:
            ops.append(Blur(prob=self.blur_prob, kernel_fraction=None))
        ops.append(Flip(prob=self.flip_prob))
        crop = Crop(scale=(self.min_scale, 1.0), antialias=self.antialias)
        return (View(count=2, size_px=self.size_px, crop=crop, ops=tuple(ops)),)


class BYOLViews(_Recipe):
    """Two views of BYOL that differ: one always blurred, one at times solarised.

    Source: Grill et al. 2020, arXiv:2006.07733v3, appendix B, table 6.
    """

    recipe: Literal["byol"] = "byol"
    min_scale: Fraction = 0.08
    blur_probs: tuple[Probability, Probability] = (1.0, 0.1)
    """Of the first and the second view; zeros for images as small as CIFAR-10's."""

    def views(self) -> tuple[View, ...]:
        """Return the definitions of the two views."""
        crop = Crop(scale=(self.min_scale, 1.0), antialias=self.antialias)
        return tuple(
            View(size_px=self.size_px, crop=crop, ops=_distort(blur, solarise, kernel_fraction=0.1))
            for blur, solarise in zip(self.blur_probs, (0.0, 0.2), strict=True)
        )


class VICRegViews(_Recipe):
    """Two views of VICReg: BYOL's, with the same probabilities in both.

    Source: Bardes et al. 2021, arXiv:2105.04906v3, appendix C.1: blur half the time with a kernel
    of 23 pixels, which cuts nothing off, and solarise one time in ten.
    Departs: The authors' code takes BYOL's two different views; for that use the recipe byol.
    """

    recipe: Literal["vicreg"] = "vicreg"
    min_scale: Fraction = 0.08
    blur_prob: Probability = 0.5
    solarise_prob: Probability = 0.1

    def views(self) -> tuple[View, ...]:
        """Return the two views' definition."""
        crop = Crop(scale=(self.min_scale, 1.0), antialias=self.antialias)
        ops = _distort(self.blur_prob, self.solarise_prob, kernel_fraction=None)
        return (View(count=2, size_px=self.size_px, crop=crop, ops=ops),)


class SwAVViews(_Recipe):
    """Two large crops and several small ones, all distorted alike.

    Source: Caron et al. 2020, arXiv:2006.09882v5, and the authors' multicropdataset.py with the
    options of scripts/swav_800ep_pretrain.sh: 2 crops of 14 to 100 % of the area, 6 of 5 to 14 %.
    """

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("local_size_px", "local_scale"), {"local_count": (0,)}),
    )
    recipe: Literal["swav"] = "swav"
    global_scale: tuple[Fraction, Fraction] = (0.14, 1.0)
    """Range of a large crop's area over the image's."""
    local_count: Annotated[int, Field(ge=0, le=MAX_VIEWS - 2)] = 6
    local_size_px: PositiveInt = 96
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.14)
    """Range of a small crop's area."""
    color_strength: NonNegativeFloat = 1.0
    """As in SimCLR's recipe."""
    blur_prob: Probability = 0.5

    def views(self) -> tuple[View, ...]:
        """Return the definitions: the large crops, then the small ones."""
        ops = _simclr_ops(self.color_strength, blur=Blur(prob=self.blur_prob, kernel_fraction=None))
        large = Crop(scale=self.global_scale, antialias=self.antialias)
        views = [View(count=2, size_px=self.size_px, crop=large, ops=ops)]
        if self.local_count > 0:
            small = Crop(scale=self.local_scale, antialias=self.antialias)
            count, size_px = self.local_count, self.local_size_px
            views.append(View(count=count, size_px=size_px, crop=small, ops=ops))
        return tuple(views)


class DINOViews(_Recipe):
    """Two large crops and several small ones.

    Source: Caron et al. 2021, arXiv:2104.14294v2, and the authors' main_dino.py: its options
    --global_crops_scale, --local_crops_scale and --local_crops_number.
    Departs: Crops are resized linearly, not bicubically; the blur is a true Gaussian.
    """

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("local_size_px", "local_scale"), {"local_count": (0,)}),
    )
    recipe: Literal["dino"] = "dino"
    global_scale: tuple[Fraction, Fraction] = (0.4, 1.0)
    """Range of a large crop's area over the image's."""
    local_count: Annotated[int, Field(ge=0, le=MAX_VIEWS - 2)] = 8
    local_size_px: PositiveInt = 96
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.4)
    """Range of a small crop's area."""
    blur_probs: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    """Of the first large crop, the second, and the small ones."""

    def views(self) -> tuple[View, ...]:
        """Return the definitions: each large crop, then the small ones."""
        large = Crop(scale=self.global_scale, antialias=self.antialias)
        views = [
            View(
                size_px=self.size_px, crop=large, ops=_distort(blur, solarise, kernel_fraction=None)
            )
            for blur, solarise in zip(self.blur_probs[:2], (0.0, 0.2), strict=True)
        ]
        if self.local_count > 0:
            small = Crop(scale=self.local_scale, antialias=self.antialias)
            views.append(
                View(
                    count=self.local_count,
                    size_px=self.local_size_px,
                    crop=small,
                    ops=_distort(self.blur_probs[2], 0.0, kernel_fraction=None),
                )
            )
        return tuple(views)


class MAEViews(_Recipe):
    """One view: crop and flip.

    Source: He et al. 2021, arXiv:2111.06377v3, appendix A.1, table 8.
    Departs: Resized linearly; the authors' code resizes bicubically.
    """

    recipe: Literal["mae"] = "mae"
    min_scale: Fraction = 0.2

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = Crop(scale=(self.min_scale, 1.0), antialias=self.antialias)
        return (View(size_px=self.size_px, crop=crop, ops=(Flip(),)),)


class FinetuneViews(_Recipe):
    """One view, to learn from labels or a teacher: crop and flip.

    Source: Chen et al. 2020, arXiv:2006.10029v2 (SimCLR v2), sec. 3.1, for fine-tuning and
    distillation; the crops are those of pretraining, 8 to 100 % of the area (the authors'
    data_util.py).
    """

    recipe: Literal["finetune"] = "finetune"
    min_scale: Fraction = 0.08
    """Smallest area of a crop over the area of the image."""
    flip_prob: Probability = 0.5
    """How often an image is mirrored: 0 where left and right matter, as in digits."""

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = Crop(scale=(self.min_scale, 1.0), antialias=self.antialias)
        ops = (Flip(prob=self.flip_prob),) if self.flip_prob > 0 else ()
        return (View(size_px=self.size_px, crop=crop, ops=ops),)


class RotationViews(_Recipe):
    """One upright view: a random square of nearly the whole image, and flip.

    The method turns it by quarters itself, on the device: that loses nothing, and gives it labels.

    Source: Gidaris et al. 2018, arXiv:1803.07728, sec. 3.2, and VISSL's rotnet_8gpu_resnet.yaml:
    a square of 224 out of a short side of 256 pixels.
    """

    recipe: Literal["rotation"] = "rotation"

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = Crop(short_side=(0.875, 0.875), antialias=self.antialias)
        return (View(size_px=self.size_px, crop=crop, ops=(Flip(),)),)


class JigsawViews(_Recipe):
    """One view that the method cuts into tiles: nearly the whole image, flip, mostly grey.

    Source: Noroozi and Favaro 2016, arXiv:1603.09246, sec. 4, and VISSL's
    jigsaw_8gpu_resnet.yaml: 255 out of a short side of 256 pixels, grey for two images of three.
    """

    recipe: Literal["jigsaw"] = "jigsaw"
    size_px: PositiveInt = 255
    grey_prob: Probability = 0.66

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = Crop(short_side=(255 / 256, 255 / 256), antialias=self.antialias)
        ops: tuple[Op, ...] = (Flip(), Grey(prob=self.grey_prob))
        return (View(size_px=self.size_px, crop=crop, ops=ops),)


class ContextEncoderViews(_Recipe):
    """One view out of which the method cuts a part: a small square of the image, and flip.

    Source: Pathak et al. 2016, arXiv:1604.07379, and the authors' train.lua: a square of 128 out
    of a short side of 350 pixels.
    """

    recipe: Literal["context_encoder"] = "context_encoder"
    size_px: PositiveInt = 128
    short_side: tuple[Fraction, Fraction] = (128 / 350, 128 / 350)
    """Range of the square's side over the image's shorter one; (1, 1) for images as small as
    CIFAR-10's."""

    def views(self) -> tuple[View, ...]:
        """Return the view's definition."""
        crop = Crop(short_side=self.short_side, antialias=self.antialias)
        return (View(size_px=self.size_px, crop=crop, ops=(Flip(),)),)


def _simclr_ops(
    strength: float,
    *,
    color_prob: float = 0.8,
    grey_prob: float = 0.2,
    blur: Blur,
    flip_prob: float = 0.5,
) -> tuple[Op, ...]:
    """Return the operations that SimCLR and SwAV share; a blur that never happens is left out."""
    jitter = ColorJitter(
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=min(0.2 * strength, 0.5),
        prob=color_prob,
    )
    ops: list[Op] = [Flip(prob=flip_prob), jitter, Grey(prob=grey_prob)]
    if blur.prob > 0:
        ops.append(blur)
    return tuple(ops)


def _distort(
    blur_prob: float, solarise_prob: float, *, kernel_fraction: float | None
) -> tuple[Op, ...]:
    """Return the operations that BYOL, VICReg and DINO share; what never happens is left out."""
    ops: list[Op] = [
        Flip(),
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, prob=0.8),
        Grey(prob=0.2),
    ]
    if blur_prob > 0:
        ops.append(Blur(prob=blur_prob, kernel_fraction=kernel_fraction))
    if solarise_prob > 0:
        ops.append(Solarise(prob=solarise_prob))
    return tuple(ops)


class CustomViews(Config):
    """Views composed in the YAML, operation by operation."""

    recipe: Literal["custom"] = "custom"
    kinds: Annotated[tuple[View, ...], Field(min_length=1)]
    """Kinds of view, each with its count, size, crop and operations."""

    @model_validator(mode="after")
    def _not_too_many(self) -> "CustomViews":
        total = sum(view.count for view in self.kinds)
        if total > MAX_VIEWS:
            raise ValueError(f"at most {MAX_VIEWS} views of an image; the kinds add up to {total}")
        return self

    def views(self) -> tuple[View, ...]:
        """Return the kinds as they stand."""
        return self.kinds


Views = Annotated[
    SimCLRViews
    | MoCoV1Views
    | MoCoV2Views
    | BYOLViews
    | VICRegViews
    | SwAVViews
    | DINOViews
    | MAEViews
    | FinetuneViews
    | RotationViews
    | JigsawViews
    | ContextEncoderViews
    | PairViews
    | CustomViews,
    Field(discriminator="recipe"),
]
