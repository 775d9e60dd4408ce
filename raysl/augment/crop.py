"""Crop a box from an image and resize it to a square: the first step of every view."""

import math
from typing import ClassVar, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage
from pydantic import model_validator

from raysl.augment.random import uniform
from raysl.config.base import GIVEN, Config, Fraction, Idle, PositiveFloat, check_ranges

Image = npt.NDArray[np.uint8]
Interpolation = Literal["bilinear", "bicubic"]
Border = Literal["black", "reflect"]
"""The pixels beyond an image: black, or the mirror image without repeating the outermost row."""

# Above this many samples per output pixel and direction, direct area averaging shrinks faster.
_MOST_SAMPLES = 3
# Up to this downscaling factor, plain interpolation is faster than averaging two samples, and at
# least as close to an antialiased resize (mean difference at 1.1: 0.7 levels for both; at 1.05: 0.4
# against 0.7).
_INTERPOLATE_UP_TO = 1.1
# OpenCV's cubic kernel has a = -0.75, Pillow's and TensorFlow's -0.5. The kernel is linear in a, so
# this share of a = -0.75 and the rest of a = 0 (nearly linear interpolation) give -0.5.
_CUBIC_SHARE = 2 / 3
# When shrinking by more than this factor, Pillow first averages blocks of whole pixels: the result
# looks the same, and a frame of 2,000 pixels takes a few milliseconds instead of tens.
_REDUCING_GAP = 3.0


class CropBox(NamedTuple):
    """A rectangle in pixels of the source image; ``top`` and ``left`` are inclusive.

    A box drawn with ``pad`` may reach beyond the image.
    """

    top: int
    left: int
    height: int
    width: int


class Crop(Config):
    """Random crop, a box of random area and shape or a square, resized to the view's side."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("scale", "ratio"), {"short_side": (GIVEN,)}),)
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Range of width over height."""
    short_side: tuple[Fraction, Fraction] | None = None
    """Crop a square instead: range of its side, as a fraction of the image's short side."""
    pad: Fraction | None = None
    """Add a border to the image before cropping the square: its width, as a fraction of the image's
    short side (0.125: 4 px on each side of CIFAR-10's 32). Requires short_side."""
    border: Border = "black"
    """The border: black, or the image's mirror image (reflect)."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of the resize. bicubic keeps more fine detail; for shrinking it uses Pillow and
    takes three times as long."""
    antialias: bool = True
    """Average over the pixels when the crop shrinks; false interpolates, which is faster."""

    @model_validator(mode="after")
    def _check_order(self) -> "Crop":
        check_ranges(self, "scale", "ratio", "short_side")
        return self

    @model_validator(mode="after")
    def _check_border(self) -> "Crop":
        if self.pad is not None and self.short_side is None:
            raise ValueError(
                f"pad={self.pad:g} needs short_side, as only squares get a border; set short_side "
                f"too ([1, 1]: a square of the image's short side)"
            )
        if self.border != "black" and self.pad is None:
            raise ValueError(f"border={self.border} needs pad, the width of the border")
        return self

    def plan(self, rng: np.random.Generator, *, height: int, width: int) -> CropBox:
        """Draw a box inside an image, or a square inside the image and its border."""
        if self.short_side is None:
            return plan_crop(rng, height=height, width=width, scale=self.scale, ratio=self.ratio)
        shorter = min(height, width)
        border = round(shorter * (self.pad or 0.0))
        side = max(1, round(shorter * uniform(rng, *self.short_side)))
        top = rng.integers(height + 2 * border - side + 1)
        left = rng.integers(width + 2 * border - side + 1)
        return CropBox(int(top) - border, int(left) - border, side, side)

    def apply(self, image: Image, box: CropBox, *, size_px: int) -> Image:
        """Crop the planned box and resize it to a square."""
        return apply_crop(
            image,
            box,
            size_px=size_px,
            interpolation=self.interpolation,
            antialias=self.antialias,
            border=self.border,
        )


def plan_crop(
    rng: np.random.Generator,
    *,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    attempts: int = 10,
) -> CropBox:
    """Draw an Inception-style crop box that lies inside the image.

    Args:
        rng: The random stream of this view.
        height: Source height in pixels, > 0.
        width: Source width in pixels, > 0.
        scale: Range of crop area over image area, 0 < low <= high <= 1.
        ratio: Range of width over height, drawn uniformly in log space.
        attempts: Rejected draws before falling back to the largest centred box.

    Source: Szegedy et al. 2015, arXiv:1409.4842, sec. 6.
    Departs: Same distribution as torchvision's RandomResizedCrop, not the same numbers.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(attempts):
        area = height * width * uniform(rng, *scale)
        aspect = math.exp(uniform(rng, low, high))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return CropBox(int(top), int(left), h, w)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return CropBox((height - h) // 2, (width - w) // 2, h, w)


def center_box(*, height: int, width: int, fraction: float = 1.0) -> CropBox:
    """Return the largest centred square, its side scaled by ``fraction`` in (0, 1]."""
    side = max(1, round(min(height, width) * fraction))
    return CropBox((height - side) // 2, (width - side) // 2, side, side)


def apply_crop(
    image: Image,
    box: CropBox,
    *,
    size_px: int,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
    border: Border = "black",
) -> Image:
    """Crop ``box`` from an image and resize it to a square.

    Args:
        image: ``(H, W, 3)`` uint8.
        box: A rectangle inside the image, or beyond it by less than the image's sides.
        size_px: Side of the result in pixels, > 0.
        interpolation: See :func:`resize`.
        antialias: Whether shrinking averages over the source pixels.
        border: What fills the box beyond the image.

    Returns:
        ``(size_px, size_px, 3)`` uint8; shares memory with the image only if nothing changes.
    """
    patch = _cut(image, box, border)
    return resize(patch, size_px=size_px, interpolation=interpolation, antialias=antialias)


def _cut(image: Image, box: CropBox, border: Border) -> Image:
    height, width = image.shape[:2]
    above, left_of = max(0, -box.top), max(0, -box.left)
    below = max(0, box.top + box.height - height)
    right_of = max(0, box.left + box.width - width)
    if not above + left_of + below + right_of:
        return image[box.top : box.top + box.height, box.left : box.left + box.width]
    kind = cv2.BORDER_CONSTANT if border == "black" else cv2.BORDER_REFLECT_101
    padded = cv2.copyMakeBorder(image, above, below, left_of, right_of, kind, value=0)
    top, left = box.top + above, box.left + left_of
    return padded[top : top + box.height, left : left + box.width]  # type: ignore[return-value]


def resize(
    patch: Image,
    *,
    size_px: int,
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
) -> Image:
    """Resize an image to a square.

    Args:
        patch: ``(H, W, 3)`` uint8.
        size_px: Side of the result in pixels, > 0.
        interpolation: ``bilinear``, the default of torchvision, or ``bicubic``: Keys' kernel with a
            = -0.5, as in Pillow and TensorFlow, which keeps more fine detail.
        antialias: Whether shrinking averages over the source pixels, in each direction separately,
            as Pillow does. False, as in ``tf.image.resize``, interpolates between the nearest two
            or four pixels; enlarging always does.

    Returns:
        ``(size_px, size_px, 3)`` uint8; shares memory with the input only if nothing changes.

    Source: R. Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", for the
    cubic kernel.
    """
    height, width = patch.shape[:2]
    if height == size_px and width == size_px:
        return patch
    if interpolation == "bicubic":
        return _bicubic(patch, size_px, averages=antialias and max(height, width) > size_px)
    return _bilinear(patch, size_px, antialias=antialias)


def _bilinear(patch: Image, size_px: int, *, antialias: bool) -> Image:
    height, width = patch.shape[:2]
    size, longest = (size_px, size_px), max(height, width)
    factor = -(-longest // size_px)
    if not antialias or longest <= _INTERPOLATE_UP_TO * size_px:
        return cv2.resize(patch, size, interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]
    if factor > _MOST_SAMPLES and min(height, width) >= size_px:
        return cv2.resize(patch, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
    # Area averaging is only fast if both directions shrink by the same integer factor, so
    # interpolate to a multiple of the size first. A frame of 500 x 375 then takes 0.32 ms instead
    # of 0.75 ms, and the result is closer to an antialiased resize.
    fine = (factor * size_px, factor * size_px)
    samples = cv2.resize(patch, fine, interpolation=cv2.INTER_LINEAR)
    return cv2.resize(samples, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _bicubic(patch: Image, size_px: int, *, averages: bool) -> Image:
    size = (size_px, size_px)
    if averages:
        # OpenCV has no such kernel. Combinations of its kernels are off by 0.6 levels or more when
        # shrinking by 1.3 to 2, more than half as far as linear interpolation.
        pixels = PillowImage.fromarray(np.ascontiguousarray(patch))
        kernel = PillowImage.Resampling.BICUBIC
        return np.asarray(pixels.resize(size, kernel, reducing_gap=_REDUCING_GAP))
    cubic = cv2.resize(patch, size, interpolation=cv2.INTER_CUBIC)
    linear = cv2.resize(patch, size, interpolation=cv2.INTER_LINEAR)
    return cv2.addWeighted(cubic, _CUBIC_SHARE, linear, 1 - _CUBIC_SHARE, 0)  # type: ignore[return-value]


def shrink_box(box: CropBox, factor: float, *, height: int, width: int) -> CropBox:
    """Convert a box to the coordinates of the same image at 1/factor of its size.

    Args:
        box: The box.
        factor: Downscaling factor, > 0.
        height: Height of the smaller image in pixels; the result lies inside it.
        width: Width of the smaller image in pixels.
    """
    h = min(height, max(1, round(box.height / factor)))
    w = min(width, max(1, round(box.width / factor)))
    top = min(round(box.top / factor), height - h)
    left = min(round(box.left / factor), width - w)
    return CropBox(top, left, h, w)
