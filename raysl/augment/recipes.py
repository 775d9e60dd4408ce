"""Views as papers define them, by name, with the knobs that people turn."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raysl.augment.pipeline import Blur, ColorJitter, Crop, Flip, Grey, Op, View
from raysl.augment.random import MAX_VIEWS
from raysl.config.base import Config, NonNegativeFloat, PositiveInt, Probability

_Scale = Annotated[float, Field(gt=0.0, le=1.0)]


class SimCLRViews(Config):
    """Two views of SimCLR: crop, flip, colour distortion, blur.

    Source: Chen et al. 2020, arXiv:2002.05709v3, appendix A (for CIFAR-10 B.9: strength 0.5, no
    blur).
    """

    recipe: Literal["simclr"] = "simclr"
    size_px: PositiveInt = 224
    min_scale: _Scale = 0.08
    """Smallest area of a crop over the area of the image."""
    color_strength: NonNegativeFloat = 1.0
    """s: jitter of 0.8 s in brightness, contrast and saturation, 0.2 s in hue."""
    color_prob: Probability = 0.8
    grey_prob: Probability = 0.2
    blur_prob: Probability = 0.5
    flip_prob: Probability = 0.5

    def views(self) -> tuple[View, ...]:
        """Return the two views' definition."""
        s = self.color_strength
        jitter = ColorJitter(
            brightness=0.8 * s,
            contrast=0.8 * s,
            saturation=0.8 * s,
            hue=min(0.2 * s, 0.5),
            prob=self.color_prob,
        )
        ops: list[Op] = [Flip(prob=self.flip_prob), jitter, Grey(prob=self.grey_prob)]
        if self.blur_prob > 0:
            ops.append(Blur(prob=self.blur_prob))
        crop = Crop(scale=(self.min_scale, 1.0))
        return (View(count=2, size_px=self.size_px, crop=crop, ops=tuple(ops)),)


class MoCoV1Views(Config):
    """Two views of MoCo v1: crop, grey, colour jitter always, flip.

    Source: He et al. 2019, arXiv:1911.05722v3, sec. 4.1, and the authors' main_moco.py.
    """

    recipe: Literal["moco_v1"] = "moco_v1"
    size_px: PositiveInt = 224
    min_scale: _Scale = 0.2

    def views(self) -> tuple[View, ...]:
        """Return the two views' definition."""
        jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, prob=1.0)
        crop = Crop(scale=(self.min_scale, 1.0))
        ops: tuple[Op, ...] = (Grey(prob=0.2), jitter, Flip())
        return (View(count=2, size_px=self.size_px, crop=crop, ops=ops),)


class MoCoV2Views(Config):
    """Two views of MoCo v2: crop, colour jitter, grey, blur, flip.

    Source: Chen et al. 2020, arXiv:2003.04297v1, sec. 3, and the authors' main_moco.py.
    Departs: A true Gaussian; the authors' PIL filter approximates it by boxes.
    """

    recipe: Literal["moco_v2"] = "moco_v2"
    size_px: PositiveInt = 224
    min_scale: _Scale = 0.2
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
        crop = Crop(scale=(self.min_scale, 1.0))
        return (View(count=2, size_px=self.size_px, crop=crop, ops=tuple(ops)),)


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
    SimCLRViews | MoCoV1Views | MoCoV2Views | CustomViews, Field(discriminator="recipe")
]
