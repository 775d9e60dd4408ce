"""A view as a YAML composes it: a crop, then operations in order; planned first, then applied."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from raysl.augment.crop import (
    CropBox,
    Image,
    apply_crop,
    apply_flip,
    apply_quarter_turn,
    apply_rotation,
    plan_crop,
    plan_flip,
    plan_quarter_turn,
    plan_rotation,
)
from raysl.augment.photometric import (
    CutoutPlan,
    JitterPlan,
    NoisePlan,
    apply_blur,
    apply_cutout,
    apply_grey,
    apply_jitter,
    apply_noise,
    apply_sobel,
    apply_solarise,
    plan_blur,
    plan_chance,
    plan_cutout,
    plan_jitter,
    plan_noise,
)
from raysl.augment.random import MAX_VIEWS, view_stream
from raysl.config.base import Config, NonNegativeFloat, PositiveFloat, PositiveInt, Probability


def _check_range(name: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    if low > high:
        raise ValueError(f"{name} is [low, high] with low <= high; got [{low}, {high}]")


class Crop(Config):
    """Random resized crop: a box of random area and aspect, resized to the view's side."""

    scale: tuple[
        Annotated[float, Field(gt=0.0, le=1.0)], Annotated[float, Field(gt=0.0, le=1.0)]
    ] = (0.08, 1.0)
    """Range of the box's area over the image's."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Range of width over height."""

    @model_validator(mode="after")
    def _ordered(self) -> "Crop":
        _check_range("scale", self.scale)
        _check_range("ratio", self.ratio)
        return self


class Flip(Config):
    """Mirror left to right."""

    op: Literal["flip"] = "flip"
    prob: Probability = 0.5

    def plan(self, rng: np.random.Generator) -> bool:
        """Draw whether to mirror."""
        return plan_flip(rng, prob=self.prob)

    def apply(self, image: Image, plan: bool) -> Image:
        """Mirror if the plan says so."""
        return apply_flip(image) if plan else image


class Rotate(Config):
    """Rotate about the centre by a small random angle."""

    op: Literal["rotate"] = "rotate"
    max_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 15.0
    prob: Probability = 1.0

    def plan(self, rng: np.random.Generator) -> float | None:
        """Draw an angle in degrees."""
        return plan_rotation(rng, max_deg=self.max_deg, prob=self.prob)

    def apply(self, image: Image, plan: float | None) -> Image:
        """Rotate by the planned angle."""
        return image if plan is None else apply_rotation(image, plan)


class QuarterTurn(Config):
    """Rotate by 90, 180 or 270 degrees."""

    op: Literal["quarter_turn"] = "quarter_turn"
    prob: Probability = 0.5

    def plan(self, rng: np.random.Generator) -> int | None:
        """Draw the number of quarter turns."""
        return plan_quarter_turn(rng, prob=self.prob)

    def apply(self, image: Image, plan: int | None) -> Image:
        """Turn as planned."""
        return image if plan is None else apply_quarter_turn(image, plan)


class ColorJitter(Config):
    """Brightness, contrast, saturation and hue in random order."""

    op: Literal["color_jitter"] = "color_jitter"
    brightness: NonNegativeFloat = 0.8
    contrast: NonNegativeFloat = 0.8
    saturation: NonNegativeFloat = 0.8
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.2
    prob: Probability = 0.8

    def plan(self, rng: np.random.Generator) -> JitterPlan | None:
        """Draw the four factors and their order."""
        return plan_jitter(
            rng,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            prob=self.prob,
        )

    def apply(self, image: Image, plan: JitterPlan | None) -> Image:
        """Apply the planned factors."""
        return image if plan is None else apply_jitter(image, plan)


class Grey(Config):
    """Drop the colour."""

    op: Literal["grey"] = "grey"
    prob: Probability = 0.2

    def plan(self, rng: np.random.Generator) -> bool:
        """Draw whether to drop the colour."""
        return plan_chance(rng, prob=self.prob)

    def apply(self, image: Image, plan: bool) -> Image:
        """Drop the colour if the plan says so."""
        return apply_grey(image) if plan else image


class Blur(Config):
    """Gaussian blur."""

    op: Literal["blur"] = "blur"
    sigma_px: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """Range of the standard deviation in pixels of the view."""
    kernel_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.1
    """Longest kernel over the view's side (SimCLR: a tenth); null: three standard deviations."""
    prob: Probability = 0.5

    def plan(self, rng: np.random.Generator) -> float | None:
        """Draw the standard deviation."""
        return plan_blur(rng, sigma_px=self.sigma_px, prob=self.prob)

    def apply(self, image: Image, plan: float | None) -> Image:
        """Blur with the planned standard deviation."""
        if plan is None:
            return image
        kernel_px = None
        if self.kernel_fraction is not None:
            kernel_px = max(3, int(image.shape[0] * self.kernel_fraction) | 1)
        return apply_blur(image, plan, kernel_px=kernel_px)


class Solarise(Config):
    """Invert the bright pixels."""

    op: Literal["solarise"] = "solarise"
    threshold: Annotated[int, Field(ge=0, le=256)] = 128
    prob: Probability = 0.2

    def plan(self, rng: np.random.Generator) -> bool:
        """Draw whether to invert."""
        return plan_chance(rng, prob=self.prob)

    def apply(self, image: Image, plan: bool) -> Image:
        """Invert if the plan says so."""
        return apply_solarise(image, threshold=self.threshold) if plan else image


class Noise(Config):
    """Gaussian noise on each channel of each pixel."""

    op: Literal["noise"] = "noise"
    sigma: tuple[
        Annotated[float, Field(ge=0.0, le=1.0)], Annotated[float, Field(ge=0.0, le=1.0)]
    ] = (0.02, 0.1)
    """Range of the standard deviation, of pixels in [0, 1]."""
    prob: Probability = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> "Noise":
        _check_range("sigma", self.sigma)
        return self

    def plan(self, rng: np.random.Generator) -> NoisePlan | None:
        """Draw the strength, and the seed of the field."""
        return plan_noise(rng, sigma=self.sigma, prob=self.prob)

    def apply(self, image: Image, plan: NoisePlan | None) -> Image:
        """Add the planned field."""
        return image if plan is None else apply_noise(image, plan)


class Sobel(Config):
    """Edges instead of the image."""

    op: Literal["sobel"] = "sobel"
    prob: Probability = 0.5

    def plan(self, rng: np.random.Generator) -> bool:
        """Draw whether to filter."""
        return plan_chance(rng, prob=self.prob)

    def apply(self, image: Image, plan: bool) -> Image:
        """Filter if the plan says so."""
        return apply_sobel(image) if plan else image


class Cutout(Config):
    """Erase a square."""

    op: Literal["cutout"] = "cutout"
    side: tuple[
        Annotated[float, Field(gt=0.0, le=1.0)], Annotated[float, Field(gt=0.0, le=1.0)]
    ] = (0.25, 0.5)
    """Range of the square's side over the view's."""
    fill: Annotated[int, Field(ge=0, le=255)] = 124
    """Level that it is filled with; 124 is near zero once ImageNet's mean is taken off."""
    prob: Probability = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> "Cutout":
        _check_range("side", self.side)
        return self

    def plan(self, rng: np.random.Generator) -> CutoutPlan | None:
        """Draw the square."""
        return plan_cutout(rng, side=self.side, prob=self.prob)

    def apply(self, image: Image, plan: CutoutPlan | None) -> Image:
        """Erase the planned square."""
        return image if plan is None else apply_cutout(image, plan, fill=self.fill)


Op = Annotated[
    Flip | Rotate | QuarterTurn | ColorJitter | Grey | Blur | Solarise | Noise | Sobel | Cutout,
    Field(discriminator="op"),
]


class View(Config):
    """One kind of view; ``count`` of them are drawn independently from each image."""

    count: Annotated[int, Field(gt=0, le=MAX_VIEWS)] = 1
    size_px: PositiveInt = 224
    """Side of the view in pixels."""
    crop: Crop = Crop()
    ops: tuple[Op, ...] = ()


class ViewPlan(NamedTuple):
    """All that is random about one view; pixels follow from it and the image alone."""

    box: CropBox
    steps: tuple[Any, ...]  # one entry an op of the view


def plan_view(view: View, rng: np.random.Generator, *, height: int, width: int) -> ViewPlan:
    """Draw a view of an image of ``height`` x ``width`` pixels from its own stream."""
    box = plan_crop(rng, height=height, width=width, scale=view.crop.scale, ratio=view.crop.ratio)
    return ViewPlan(box, tuple(op.plan(rng) for op in view.ops))


def apply_view(view: View, image: Image, plan: ViewPlan) -> Image:
    """Make the planned view.

    Args:
        view: The kind of view the plan was drawn for.
        image: ``(H, W, 3)`` uint8 RGB.
        plan: What :func:`plan_view` drew.

    Returns:
        ``(size_px, size_px, 3)`` uint8; may share memory with ``image`` if nothing had to change.
    """
    result = apply_crop(image, plan.box, size_px=view.size_px)
    for op, step in zip(view.ops, plan.steps, strict=True):
        result = op.apply(result, step)
    return result


def make_views(
    image: Image, views: Sequence[View], *, seed: int, epoch: int, index: int
) -> list[list[Image]]:
    """Make all views of one image: a list a kind of view, with ``count`` entries each.

    A view is a function of (seed, epoch, index, number of the view) alone.
    """
    height, width = image.shape[:2]
    result: list[list[Image]] = []
    number = 0
    for view in views:
        made = []
        for _ in range(view.count):
            rng = view_stream(seed=seed, epoch=epoch, index=index, view=number)
            made.append(apply_view(view, image, plan_view(view, rng, height=height, width=width)))
            number += 1
        result.append(made)
    return result
