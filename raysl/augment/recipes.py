"""View recipes with several views, named after their papers, and views composed in YAML."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from raysl.augment.crop import Interpolation
from raysl.augment.one_view import (
    ContextEncoderViews,
    FinetuneViews,
    JigsawViews,
    MAEViews,
    RotationViews,
)
from raysl.augment.ops import Blur, ColorJitter, Flip, Grey, Op, Solarise
from raysl.augment.pairs import PairViews
from raysl.augment.photometric import BrightnessKind
from raysl.augment.pipeline import Recipe, View
from raysl.augment.random import MAX_VIEWS
from raysl.config.base import (
    Config,
    Fraction,
    Idle,
    NonNegativeFloat,
    PositiveInt,
    Probability,
)


class SimCLRViews(Recipe):
    """Two views of SimCLR: crop, flip, colour distortion, blur.

    Source: Chen et al. 2020, arXiv:2002.05709v3, appendix A (for CIFAR-10 B.9: strength 0.5, no
    blur), and the authors' tf2/data_util.py: bicubic crops (319), multiplied brightness (36,
    version 2's, which is the default for both).
    Departs: The authors' resize does not average when it shrinks: antialias=false. This is not the
    default here, because it degrades images of other sizes than ImageNet's. The sides of their
    crops are uniform and each crop contains at least a tenth of the image (TensorFlow's
    sample_distorted_bounding_box with min_object_covered 0.1); ours are uniform in the area.
    """

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("color_prob",), {"color_strength": (0,)}),)
    recipe: Literal["simclr"] = "simclr"
    interpolation: Interpolation = "bicubic"
    min_scale: Fraction = 0.08
    """Smallest area of a crop over the area of the image."""
    color_strength: NonNegativeFloat = 1.0
    """Strength s of the jitter: 0.8 s for brightness, contrast and saturation, 0.2 s for hue."""
    color_prob: Probability = 0.8
    """Probability of the colour jitter."""
    grey_prob: Probability = 0.2
    """Probability of turning an image grey."""
    blur_prob: Probability = 0.5
    """Probability of the blur."""
    flip_prob: Probability = 0.5
    """Probability of mirroring an image: 0 where left and right matter, as for digits."""

    def views(self) -> tuple[View, ...]:
        """Return the definition of the two views."""
        ops = _simclr_ops(
            self.color_strength,
            color_prob=self.color_prob,
            grey_prob=self.grey_prob,
            blur=Blur(prob=self.blur_prob),
            flip_prob=self.flip_prob,
        )
        crop = self.crop((self.min_scale, 1.0))
        return (View(count=2, size_px=self.size_px, crop=crop, ops=ops),)


class MoCoV1Views(Recipe):
    """Two views of MoCo v1: crop, grey, colour jitter always, flip.

    Source: He et al. 2019, arXiv:1911.05722v3, sec. 3.3, and the authors' main_moco.py.
    """

    recipe: Literal["moco_v1"] = "moco_v1"
    min_scale: Fraction = 0.2
    """Smallest area of a crop over the area of the image."""

    def views(self) -> tuple[View, ...]:
        """Return the definition of the two views."""
        jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, prob=1.0)
        crop = self.crop((self.min_scale, 1.0))
        ops: tuple[Op, ...] = (Grey(prob=0.2), jitter, Flip())
        return (View(count=2, size_px=self.size_px, crop=crop, ops=ops),)


class MoCoV2Views(Recipe):
    """Two views of MoCo v2: crop, colour jitter, grey, blur, flip.

    Source: Chen et al. 2020, arXiv:2003.04297v1, sec. 3, and the authors' main_moco.py.
    Departs: A true Gaussian; the authors' PIL filter approximates it by boxes.
    """

    recipe: Literal["moco_v2"] = "moco_v2"
    min_scale: Fraction = 0.2
    """Smallest area of a crop over the area of the image."""
    blur_prob: Probability = 0.5
    """Probability of the blur."""
    flip_prob: Probability = 0.5
    """Probability of mirroring an image: 0 where left and right matter, as for digits."""

    def views(self) -> tuple[View, ...]:
        """Return the definition of the two views."""
        ops: list[Op] = [
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, prob=0.8),
            Grey(prob=0.2),
        ]
        if self.blur_prob > 0:
            ops.append(Blur(prob=self.blur_prob, kernel_fraction=None))
        ops.append(Flip(prob=self.flip_prob))
        crop = self.crop((self.min_scale, 1.0))
        return (View(count=2, size_px=self.size_px, crop=crop, ops=tuple(ops)),)


class BYOLViews(Recipe):
    """Two views of BYOL: the first always blurred, the second sometimes solarised.

    Source: Grill et al. 2020, arXiv:2006.07733v3, appendix B, table 6, and the authors' code
    (deepmind-research, byol/utils): bicubic crops (dataset.py:201), brightness that is added
    (augmentations.py:239, 261).
    Departs: Contrast is changed about the image's mean grey level; the authors change it about each
    channel's mean. Saturation is a blend with grey; the authors scale the saturation of HSV. Their
    resize does not average when it shrinks: antialias=false.
    """

    recipe: Literal["byol"] = "byol"
    interpolation: Interpolation = "bicubic"
    brightness_kind: BrightnessKind = "add"
    """Whether brightness is added, or multiplies as in the ports to torchvision (Barlow Twins,
    VICReg, MoCo v3, lightly), where it also changes the contrast."""
    min_scale: Fraction = 0.08
    """Smallest area of a crop over the area of the image."""
    blur_probs: tuple[Probability, Probability] = (1.0, 0.1)
    """Probability of the blur in the first and in the second view; use zeros for images as small as
    CIFAR-10's."""

    def views(self) -> tuple[View, ...]:
        """Return the definitions of the two views."""
        crop, kind = self.crop((self.min_scale, 1.0)), self.brightness_kind
        return tuple(
            View(
                size_px=self.size_px,
                crop=crop,
                ops=_byol_ops(blur, solarise, kernel_fraction=0.1, brightness_kind=kind),
            )
            for blur, solarise in zip(self.blur_probs, (0.0, 0.2), strict=True)
        )


class VICRegViews(Recipe):
    """Two views of VICReg: BYOL's, with equal probabilities in both.

    Source: Bardes et al. 2021, arXiv:2105.04906v3, appendix C.1: blur with probability 0.5 and a
    kernel of 23 pixels, which does not truncate it, and solarise with probability 0.1. Bicubic
    crops and torchvision's colours as in the authors' augmentations.py (41 to 80).
    Departs: The authors' code uses BYOL's two different views; the recipe byol with
    brightness_kind=multiply does the same.
    """

    recipe: Literal["vicreg"] = "vicreg"
    interpolation: Interpolation = "bicubic"
    min_scale: Fraction = 0.08
    """Smallest area of a crop over the area of the image."""
    blur_prob: Probability = 0.5
    """Probability of the blur."""
    solarise_prob: Probability = 0.1
    """Probability of solarising."""

    def views(self) -> tuple[View, ...]:
        """Return the definition of the two views."""
        crop = self.crop((self.min_scale, 1.0))
        ops = _byol_ops(self.blur_prob, self.solarise_prob, kernel_fraction=None)
        return (View(count=2, size_px=self.size_px, crop=crop, ops=ops),)


class SwAVViews(Recipe):
    """Two large crops and several small ones, all with the same distortions.

    Source: Caron et al. 2020, arXiv:2006.09882v5, and the authors' multicropdataset.py with the
    options of scripts/swav_800ep_pretrain.sh: 2 crops of 14 to 100 % of the area, 6 of 5 to 14 %.
    """

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("local_size_px", "local_scale"), {"local_count": (0,)}),
    )
    recipe: Literal["swav"] = "swav"
    global_scale: tuple[Fraction, Fraction] = (0.14, 1.0)
    """Range of a large crop's area, as a fraction of the image's area."""
    local_count: Annotated[int, Field(ge=0, le=MAX_VIEWS - 2)] = 6
    """Number of local views."""
    local_size_px: PositiveInt = 96
    """Side of a local view in pixels."""
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.14)
    """Range of a small crop's area, as a fraction of the image's area."""
    color_strength: NonNegativeFloat = 1.0
    """Strength of the colour jitter, as in the recipe simclr."""
    blur_prob: Probability = 0.5
    """Probability of the blur."""

    def views(self) -> tuple[View, ...]:
        """Return the definitions: the large crops, then the small ones."""
        ops = _simclr_ops(self.color_strength, blur=Blur(prob=self.blur_prob, kernel_fraction=None))
        large = self.crop(self.global_scale)
        views = [View(count=2, size_px=self.size_px, crop=large, ops=ops)]
        if self.local_count > 0:
            small = self.crop(self.local_scale)
            count, size_px = self.local_count, self.local_size_px
            views.append(View(count=count, size_px=size_px, crop=small, ops=ops))
        return tuple(views)


class DINOViews(Recipe):
    """Two large crops and several small ones.

    Source: Caron et al. 2021, arXiv:2104.14294v2, and the authors' main_dino.py: its options
    --global_crops_scale, --local_crops_scale and --local_crops_number; bicubic crops (436 to 452).
    Departs: The blur is a true Gaussian.
    """

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(("local_size_px", "local_scale"), {"local_count": (0,)}),
    )
    recipe: Literal["dino"] = "dino"
    interpolation: Interpolation = "bicubic"
    global_scale: tuple[Fraction, Fraction] = (0.4, 1.0)
    """Range of a large crop's area, as a fraction of the image's area."""
    local_count: Annotated[int, Field(ge=0, le=MAX_VIEWS - 2)] = 8
    """Number of local views."""
    local_size_px: PositiveInt = 96
    """Side of a local view in pixels."""
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.4)
    """Range of a small crop's area, as a fraction of the image's area."""
    blur_probs: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    """Probability of the blur in the first large crop, in the second, and in the small ones."""

    def views(self) -> tuple[View, ...]:
        """Return the definitions: each large crop, then the small ones."""
        large = self.crop(self.global_scale)
        views = [
            View(
                size_px=self.size_px,
                crop=large,
                ops=_byol_ops(blur, solarise, kernel_fraction=None),
            )
            for blur, solarise in zip(self.blur_probs[:2], (0.0, 0.2), strict=True)
        ]
        if self.local_count > 0:
            small = self.crop(self.local_scale)
            views.append(
                View(
                    count=self.local_count,
                    size_px=self.local_size_px,
                    crop=small,
                    ops=_byol_ops(self.blur_probs[2], 0.0, kernel_fraction=None),
                )
            )
        return tuple(views)


def _simclr_ops(
    strength: float,
    *,
    color_prob: float = 0.8,
    grey_prob: float = 0.2,
    blur: Blur,
    flip_prob: float = 0.5,
) -> tuple[Op, ...]:
    """Return the operations that SimCLR and SwAV share; a blur with probability 0 is left out."""
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


def _byol_ops(
    blur_prob: float,
    solarise_prob: float,
    *,
    kernel_fraction: float | None,
    brightness_kind: BrightnessKind = "multiply",
) -> tuple[Op, ...]:
    """Return the operations that BYOL, VICReg and DINO share, without those of probability 0."""
    ops: list[Op] = [
        Flip(),
        ColorJitter(
            brightness=0.4,
            brightness_kind=brightness_kind,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            prob=0.8,
        ),
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
    def _check_count(self) -> "CustomViews":
        total = sum(view.count for view in self.kinds)
        if total > MAX_VIEWS:
            raise ValueError(f"at most {MAX_VIEWS} views of an image; the kinds add up to {total}")
        return self

    def views(self) -> tuple[View, ...]:
        """Return the configured kinds."""
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
