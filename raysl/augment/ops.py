"""Operations on the pixels of a view, configurable in YAML; planned first, then applied.

An operation that can also run on the accelerator exports its plan as numbers: see
:mod:`raysl.train.device_ops`.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from raysl.augment.crop import (
    CropBox,
    Image,
    apply_crop,
    apply_flip,
    apply_quarter_turn,
    apply_rotation,
    part_box,
    plan_flip,
    plan_part,
    plan_quarter_turn,
    plan_rotation,
)
from raysl.augment.photometric import (
    BrightnessKind,
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
    blur_taps,
    plan_blur,
    plan_chance,
    plan_cutout,
    plan_jitter,
    plan_noise,
)
from raysl.config.base import Config, NonNegativeFloat, PositiveFloat, Probability

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Numbers = tuple[float, ...]


def check_range(name: str, bounds: tuple[float, float]) -> None:
    """Raise ValueError unless ``bounds`` is [low, high] with low <= high."""
    low, high = bounds
    if low > high:
        raise ValueError(f"{name} is [low, high] with low <= high; got [{low}, {high}]")


class CropPart(Config):
    """Crop a random part of the view and enlarge it to the view's side.

    Every view starts with a crop of the image; this one crops the view, at any point of the
    sequence.
    """

    op: Literal["crop"] = "crop"
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Range of the crop's area over the view's."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Range of width over height."""
    prob: Probability = 1.0
    """Probability of applying the operation."""

    @model_validator(mode="after")
    def _ordered(self) -> "CropPart":
        check_range("scale", self.scale)
        check_range("ratio", self.ratio)
        return self

    def plan(self, rng: np.random.Generator) -> CropBox | None:
        """Draw the crop."""
        return plan_part(rng, scale=self.scale, ratio=self.ratio, prob=self.prob)

    def apply(self, image: Image, plan: CropBox | None) -> Image:
        """Apply the planned crop."""
        if plan is None:
            return image
        return apply_crop(image, part_box(plan, size_px=len(image)), size_px=len(image))

    def numbers(self, plan: CropBox | None, *, size_px: int) -> Numbers:
        """Return 1 or 0, and the crop's top, left, height and width in pixels."""
        return (0.0,) * 5 if plan is None else (1.0, *part_box(plan, size_px=size_px))


class Flip(Config):
    """Mirror left to right."""

    op: Literal["flip"] = "flip"
    prob: Probability = 0.5
    """Probability of applying the operation."""

    def plan(self, rng: np.random.Generator) -> bool:
        """Draw whether to mirror."""
        return plan_flip(rng, prob=self.prob)

    def apply(self, image: Image, plan: bool) -> Image:
        """Mirror if planned."""
        return apply_flip(image) if plan else image

    def numbers(self, plan: bool, *, size_px: int) -> Numbers:
        """Return 1 to mirror, else 0."""
        return (float(plan),)


class Rotate(Config):
    """Rotate about the centre by a small random angle."""

    op: Literal["rotate"] = "rotate"
    max_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 15.0
    """Largest rotation to either side, in degrees."""
    prob: Probability = 1.0
    """Probability of applying the operation."""

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
    """Probability of applying the operation."""

    def plan(self, rng: np.random.Generator) -> int | None:
        """Draw the number of quarter turns."""
        return plan_quarter_turn(rng, prob=self.prob)

    def apply(self, image: Image, plan: int | None) -> Image:
        """Rotate as planned."""
        return image if plan is None else apply_quarter_turn(image, plan)


class ColorJitter(Config):
    """Brightness, contrast, saturation and hue in random order."""

    op: Literal["color_jitter"] = "color_jitter"
    brightness: NonNegativeFloat = 0.8
    """The factor of brightness is drawn from [max(0, 1 - brightness), 1 + brightness]."""
    brightness_kind: BrightnessKind = "multiply"
    """multiply: a factor from 1 - brightness to 1 + brightness, as in torchvision. add: a value
    from -brightness to +brightness, for pixels in [0, 1], as in the code of BYOL's authors."""
    contrast: NonNegativeFloat = 0.8
    """Likewise the factor of contrast."""
    saturation: NonNegativeFloat = 0.8
    """Likewise the factor of saturation."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.2
    """Largest shift of the hue to either side, in turns."""
    prob: Probability = 0.8
    """Probability of applying the operation."""

    def plan(self, rng: np.random.Generator) -> JitterPlan | None:
        """Draw the four factors and their order."""
        return plan_jitter(
            rng,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            prob=self.prob,
            brightness_kind=self.brightness_kind,
        )

    def apply(self, image: Image, plan: JitterPlan | None) -> Image:
        """Apply the planned factors."""
        return image if plan is None else apply_jitter(image, plan)

    def numbers(self, plan: JitterPlan | None, *, size_px: int) -> Numbers:
        """Return 1 or 0, the four factors, and their order as four numbers."""
        return (0.0,) * 9 if plan is None else (1.0, *plan[:4], *map(float, plan.order))


class Grey(Config):
    """Convert to grey."""

    op: Literal["grey"] = "grey"
    prob: Probability = 0.2
    """Probability of applying the operation."""

    def plan(self, rng: np.random.Generator) -> bool:
        """Draw whether to convert to grey."""
        return plan_chance(rng, prob=self.prob)

    def apply(self, image: Image, plan: bool) -> Image:
        """Convert to grey if planned."""
        return apply_grey(image) if plan else image

    def numbers(self, plan: bool, *, size_px: int) -> Numbers:
        """Return 1 to convert to grey, else 0."""
        return (float(plan),)


class Blur(Config):
    """Gaussian blur."""

    op: Literal["blur"] = "blur"
    sigma_px: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """Range of the standard deviation, in pixels of the view."""
    kernel_fraction: Fraction | None = 0.1
    """Largest kernel over the view's side (SimCLR: a tenth); null: three standard deviations."""
    prob: Probability = 0.5
    """Probability of applying the operation."""

    def plan(self, rng: np.random.Generator) -> float | None:
        """Draw the standard deviation."""
        return plan_blur(rng, sigma_px=self.sigma_px, prob=self.prob)

    def apply(self, image: Image, plan: float | None) -> Image:
        """Blur with the planned standard deviation."""
        return image if plan is None else apply_blur(image, plan, taps=self._taps(plan, len(image)))

    def numbers(self, plan: float | None, *, size_px: int) -> Numbers:
        """Return the standard deviation in pixels and the number of taps; zeros for no blur."""
        return (0.0, 0.0) if plan is None else (plan, float(self._taps(plan, size_px)))

    def _taps(self, sigma_px: float, size_px: int) -> int:
        longest = None
        if self.kernel_fraction is not None:
            longest = max(3, int(size_px * self.kernel_fraction) | 1)
        return blur_taps(sigma_px, longest=longest)


class Solarise(Config):
    """Invert the bright pixels."""

    op: Literal["solarise"] = "solarise"
    threshold: Annotated[int, Field(ge=0, le=256)] = 128
    """Values from here on are inverted, of 255."""
    prob: Probability = 0.2
    """Probability of applying the operation."""

    def plan(self, rng: np.random.Generator) -> bool:
        """Draw whether to invert."""
        return plan_chance(rng, prob=self.prob)

    def apply(self, image: Image, plan: bool) -> Image:
        """Invert if planned."""
        return apply_solarise(image, threshold=self.threshold) if plan else image

    def numbers(self, plan: bool, *, size_px: int) -> Numbers:
        """Return 1 to invert, else 0."""
        return (float(plan),)


class Noise(Config):
    """Gaussian noise on each channel of each pixel."""

    op: Literal["noise"] = "noise"
    sigma: tuple[
        Annotated[float, Field(ge=0.0, le=1.0)], Annotated[float, Field(ge=0.0, le=1.0)]
    ] = (0.02, 0.1)
    """Range of the standard deviation, for pixels in [0, 1]."""
    prob: Probability = 0.5
    """Probability of applying the operation."""

    @model_validator(mode="after")
    def _ordered(self) -> "Noise":
        check_range("sigma", self.sigma)
        return self

    def plan(self, rng: np.random.Generator) -> NoisePlan | None:
        """Draw the strength and the seed of the noise."""
        return plan_noise(rng, sigma=self.sigma, prob=self.prob)

    def apply(self, image: Image, plan: NoisePlan | None) -> Image:
        """Add the planned noise."""
        return image if plan is None else apply_noise(image, plan)


class Sobel(Config):
    """Replace the image by its edges."""

    op: Literal["sobel"] = "sobel"
    prob: Probability = 0.5
    """Probability of applying the operation."""

    def plan(self, rng: np.random.Generator) -> bool:
        """Draw whether to filter."""
        return plan_chance(rng, prob=self.prob)

    def apply(self, image: Image, plan: bool) -> Image:
        """Filter if planned."""
        return apply_sobel(image) if plan else image

    def numbers(self, plan: bool, *, size_px: int) -> Numbers:
        """Return 1 to filter, else 0."""
        return (float(plan),)


class Cutout(Config):
    """Fill a square with one level."""

    op: Literal["cutout"] = "cutout"
    side: tuple[Fraction, Fraction] = (0.25, 0.5)
    """Range of the square's side over the view's."""
    fill: Annotated[int, Field(ge=0, le=255)] = 124
    """Fill level; 124 is near zero after ImageNet's mean is subtracted."""
    prob: Probability = 0.5
    """Probability of applying the operation."""

    @model_validator(mode="after")
    def _ordered(self) -> "Cutout":
        check_range("side", self.side)
        return self

    def plan(self, rng: np.random.Generator) -> CutoutPlan | None:
        """Draw the square."""
        return plan_cutout(rng, side=self.side, prob=self.prob)

    def apply(self, image: Image, plan: CutoutPlan | None) -> Image:
        """Fill the planned square."""
        return image if plan is None else apply_cutout(image, plan, fill=self.fill)

    def numbers(self, plan: CutoutPlan | None, *, size_px: int) -> Numbers:
        """Return 1 or 0 and the square's centre and side, in fractions."""
        return (0.0,) * 4 if plan is None else (1.0, *plan)


Op = Annotated[
    CropPart
    | Flip
    | Rotate
    | QuarterTurn
    | ColorJitter
    | Grey
    | Blur
    | Solarise
    | Noise
    | Sobel
    | Cutout,
    Field(discriminator="op"),
]
