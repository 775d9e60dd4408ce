"""Operations on the colours of a view: colour jitter, grey, solarise.

The definitions are torchvision's on uint8 images (clamped and rounded after each step), because the
SimCLR and MoCo v2 recipes were tuned with them.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from raysl.augment.base import LUMA, DeviceOperation, Floats, to_device, to_levels, to_luma
from raysl.augment.crop import Image
from raysl.augment.random import uniform
from raysl.config.base import NonNegativeFloat, Probability

if TYPE_CHECKING:
    from torch import Tensor

_IDENTITY = np.eye(3, 4, dtype=np.float32)
_LEVELS = np.arange(256, dtype=np.float32)

BrightnessKind = Literal["multiply", "add"]
"""Whether the pixels are multiplied by the brightness, which also changes the contrast, or it is
added to them."""


class JitterPlan(NamedTuple):
    """Factors of one colour jitter, and their order."""

    brightness: float  # multiplies the pixels, or is added to pixels in [0, 1]
    contrast: float  # 0 is the mean grey level everywhere, 1 the image
    saturation: float  # 0 is grey, 1 the image
    hue: float  # added to the hue, in turns, in [-0.5, 0.5]
    order: tuple[int, ...]  # a permutation of (0, 1, 2, 3) = brightness, contrast, saturation, hue


class ColorJitter(DeviceOperation):
    """Brightness, contrast, saturation and hue in random order.

    Source: Chen et al. 2020, arXiv:2002.05709v3, appendix A; torchvision's ColorJitter. Added
    brightness: the code of BYOL's authors (deepmind-research, byol/utils/augmentations.py).
    """

    op: Literal["color_jitter"] = "color_jitter"
    prob: Probability = 0.8
    brightness: NonNegativeFloat = 0.8
    """The factor of brightness is drawn from [max(0, 1 - brightness), 1 + brightness]."""
    brightness_kind: BrightnessKind = "multiply"
    """multiply: a factor from 1 - brightness to 1 + brightness, as in torchvision. add: a value
    from -brightness to +brightness, for pixels in [0, 1], as in the code of BYOL's authors."""
    contrast: NonNegativeFloat = 0.8
    """The factor of contrast is drawn from [max(0, 1 - contrast), 1 + contrast]."""
    saturation: NonNegativeFloat = 0.8
    """The factor of saturation is drawn from [max(0, 1 - saturation), 1 + saturation]."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.2
    """Largest shift of the hue to either side, in turns."""
    num_params: ClassVar[int] = 8

    def draw(self, rng: np.random.Generator) -> JitterPlan:
        """Draw the four factors, each uniform in its range, and their order."""
        ranges = [
            (max(0.0, 1 - x), 1 + x) for x in (self.brightness, self.contrast, self.saturation)
        ]
        if self.brightness_kind == "add":
            ranges[0] = (-self.brightness, self.brightness)
        brightness, contrast, saturation = (uniform(rng, *bounds) for bounds in ranges)
        hue = uniform(rng, -self.hue, self.hue)
        return JitterPlan(brightness, contrast, saturation, hue, tuple(rng.permutation(4).tolist()))

    def transform(self, image: Image, factors: JitterPlan) -> Image:
        """Apply the four steps in the drawn order."""
        brighten = apply_brightness if self.brightness_kind == "multiply" else add_brightness
        steps = (brighten, apply_contrast, apply_saturation, apply_hue)
        values = factors[:4]
        for number in factors.order:
            image = steps[number](image, values[number])
        return image

    def to_numbers(self, factors: JitterPlan, size_px: int) -> tuple[float, ...]:
        """Return the four factors, and their order as four numbers."""
        return (*factors[:4], *factors.order)

    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Apply the four steps to each image in its own order."""
        factors = to_device(params[:, :4], images)
        order = params[:, 4:].astype(np.int64)
        brighten = _brightness if self.brightness_kind == "multiply" else _added_brightness
        for turn in range(4):
            for number, step in enumerate((brighten, _contrast, _saturation, _hue)):
                rows = np.flatnonzero(order[:, turn] == number)
                if len(rows):
                    index = to_device(rows, images)
                    changed = step(images[index], factors[index, number].view(-1, 1, 1, 1))
                    images = images.index_copy(0, index, changed)
        return images


def apply_brightness(image: Image, factor: float) -> Image:
    """Multiply by ``factor`` >= 0 and clamp to [0, 255]."""
    return _mix_channels(image, _IDENTITY * factor)


def add_brightness(image: Image, value: float) -> Image:
    """Add 255 times ``value`` and clamp to [0, 255]."""
    shifted = _IDENTITY.copy()
    shifted[:, 3] = 255 * value
    return _mix_channels(image, shifted)


def apply_contrast(image: Image, factor: float) -> Image:
    """Blend with the mean grey level of the image by ``factor`` >= 0."""
    mean = float(np.dot(cv2.mean(image)[:3], LUMA))
    blend = _IDENTITY * factor
    blend[:, 3] = round(mean) * (1 - factor)
    return _mix_channels(image, blend)


def apply_saturation(image: Image, factor: float) -> Image:
    """Blend with the grey image by ``factor`` >= 0."""
    blend = _IDENTITY * factor
    blend[:, :3] += LUMA * (1 - factor)
    return _mix_channels(image, blend)


def _mix_channels(image: Image, matrix: npt.NDArray[np.float32]) -> Image:
    """Apply a (3, 4) matrix to (R, G, B, 1), round and clamp: 3 times as fast as a lookup table."""
    return cv2.transform(image, matrix)  # type: ignore[return-value]


def apply_hue(image: Image, shift: float) -> Image:
    """Shift the hue by ``shift`` turns in [-0.5, 0.5]; value and saturation do not change."""
    if shift == 0:
        return image
    # OpenCV maps a full turn to 256 levels in one direction and to 255 in the other.
    turned = np.rint((_LEVELS / 256 + shift) % 1 * 255).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] = cv2.LUT(hsv[..., 0], turned)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)  # type: ignore[return-value]


def _brightness(images: "Tensor", factor: "Tensor") -> "Tensor":
    return to_levels(images * factor)


def _added_brightness(images: "Tensor", value: "Tensor") -> "Tensor":
    return to_levels(images + 255 * value)


def _contrast(images: "Tensor", factor: "Tensor") -> "Tensor":
    mean = to_luma(images).mean(dim=(1, 2, 3), keepdim=True).round()
    return to_levels(images * factor + mean * (1 - factor))


def _saturation(images: "Tensor", factor: "Tensor") -> "Tensor":
    return to_levels(images * factor + to_luma(images) * (1 - factor))


def _hue(images: "Tensor", shift: "Tensor") -> "Tensor":
    """Shift the hue; saturation and value do not change.

    Source: Smith 1978, "Color gamut transform pairs" (the hexcone model).
    """
    value = images.max(dim=1, keepdim=True).values
    chroma = value - images.min(dim=1, keepdim=True).values
    red, green, blue = images.split(1, dim=1)
    safe = chroma.clamp(min=1)  # grey pixels have no chroma, and any sector leaves them grey
    sector = (2 + (blue - red) / safe).where(value == green, 4 + (red - green) / safe)
    sector = ((green - blue) / safe).where(value == red, sector) + 6 * shift
    offsets = to_device(np.array([5, 3, 1], dtype=np.float32), images).view(1, 3, 1, 1)
    position = (sector + offsets) % 6
    share = position.minimum(4 - position).clamp(0, 1)
    return to_levels(value - chroma * share)


class Grey(DeviceOperation):
    """Convert to grey."""

    op: Literal["grey"] = "grey"
    prob: Probability = 0.2

    def transform(self, image: Image, params: bool) -> Image:
        """Write the luma into all three channels."""
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]

    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Write the luma into all three channels of every image."""
        return to_luma(images).round().expand_as(images)


class Solarise(DeviceOperation):
    """Invert the bright pixels.

    Source: Grill et al. 2020, arXiv:2006.07733v3, appendix B.
    """

    op: Literal["solarise"] = "solarise"
    prob: Probability = 0.2
    threshold: Annotated[int, Field(ge=0, le=256)] = 128
    """Levels from this one on are inverted; the highest level is 255."""

    def transform(self, image: Image, params: bool) -> Image:
        """Invert the levels from the threshold on."""
        levels = np.arange(256)
        table = np.where(levels >= self.threshold, 255 - levels, levels)
        return cv2.LUT(image, table.astype(np.uint8))  # type: ignore[return-value]

    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Invert the levels from the threshold on in every image."""
        return images.where(images < self.threshold, 255 - images)
