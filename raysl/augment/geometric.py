"""Geometric operations: crop a part, flip, rotate, turn by quarters, cut out a square."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from raysl.augment.base import DeviceOperation, Floats, Operation, to_device, to_levels
from raysl.augment.crop import CropBox, Image, apply_crop, plan_crop, shrink_box
from raysl.augment.random import uniform
from raysl.config.base import Fraction, PositiveFloat, Probability, check_ranges

if TYPE_CHECKING:
    from torch import Tensor

# A crop of a view is drawn before the view's size is known, for a nominal side of this length.
PLANNED_SIDE_PX = 1 << 16


class CropPart(DeviceOperation):
    """Crop a random part of the view and enlarge it to the view's side.

    Every view starts with a crop of the image; this one crops the view, at any point of the
    sequence.
    """

    op: Literal["crop"] = "crop"
    prob: Probability = 1.0
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the view's area."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Range of width over height."""
    num_params: ClassVar[int] = 4

    @model_validator(mode="after")
    def _check_order(self) -> "CropPart":
        check_ranges(self, "scale", "ratio")
        return self

    def draw(self, rng: np.random.Generator) -> CropBox:
        """Draw a box as :func:`plan_crop` does, in a view of ``PLANNED_SIDE_PX``."""
        side = PLANNED_SIDE_PX
        return plan_crop(rng, height=side, width=side, scale=self.scale, ratio=self.ratio)

    def transform(self, image: Image, box: CropBox) -> Image:
        """Crop the box and resize it to the image's side."""
        return apply_crop(image, self.scaled(box, len(image)), size_px=len(image))

    def scaled(self, box: CropBox, size_px: int) -> CropBox:
        """Scale a drawn box to a view of ``size_px``."""
        return shrink_box(box, PLANNED_SIDE_PX / size_px, height=size_px, width=size_px)

    def to_numbers(self, box: CropBox, size_px: int) -> tuple[float, ...]:
        """Return the box's top, left, height and width in pixels of the view."""
        return self.scaled(box, size_px)

    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Enlarge the box of each image by linear interpolation, one direction after the other."""
        top, left, height, width = params.T
        rows = _enlarge(images, 2, first=top, length=height)
        return to_levels(_enlarge(rows, 3, first=left, length=width))


def _enlarge(images: "Tensor", dim: int, *, first: Floats, length: Floats) -> "Tensor":
    """Stretch ``length`` rows or columns, starting at ``first``, to the full side, per image."""
    size = images.shape[dim]
    # Source coordinate of each result pixel, relative to ``first``, ``(N, S)``.
    coordinate = (np.arange(size) + 0.5) * (length / size)[:, None] - 0.5
    coordinate = np.clip(coordinate, 0, length[:, None] - 1)
    below = np.floor(coordinate)
    above = np.minimum(below + 1, length[:, None] - 1)
    shape = [len(images), 1, 1, 1]
    shape[dim] = size

    def pixels_at(coordinates: npt.NDArray[np.float64]) -> "Tensor":
        index = to_device((first[:, None] + coordinates).astype(np.int64), images)
        return images.gather(dim, index.view(shape).expand(images.shape))

    share = to_device((coordinate - below).astype(np.float32), images).view(shape)
    return pixels_at(below).lerp(pixels_at(above), share)


class Flip(DeviceOperation):
    """Mirror left to right."""

    op: Literal["flip"] = "flip"
    prob: Probability = 0.5

    def transform(self, image: Image, params: bool) -> Image:
        """Mirror the image."""
        return cv2.flip(image, 1)  # type: ignore[return-value]

    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Mirror every image."""
        return images.flip(3)


class Rotate(Operation):
    """Rotate about the centre by a small random angle."""

    op: Literal["rotate"] = "rotate"
    prob: Probability = 1.0
    max_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 15.0
    """Largest rotation to either side, in degrees."""

    def draw(self, rng: np.random.Generator) -> float:
        """Draw an angle in degrees, uniform in [-max_deg, max_deg]."""
        return uniform(rng, -self.max_deg, self.max_deg)

    def transform(self, image: Image, angle_deg: float) -> Image:
        """Rotate counter-clockwise.

        Border pixels are repeated outwards: black corners would reveal the angle to the network.
        """
        height, width = image.shape[:2]
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle_deg, 1.0)
        return cv2.warpAffine(  # type: ignore[return-value]
            image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )


class QuarterTurn(Operation):
    """Rotate by 90, 180 or 270 degrees."""

    op: Literal["quarter_turn"] = "quarter_turn"
    prob: Probability = 0.5

    def draw(self, rng: np.random.Generator) -> int:
        """Draw 1, 2 or 3 quarter turns, equally likely."""
        return int(rng.integers(1, 4))

    def transform(self, image: Image, turns: int) -> Image:
        """Rotate a square image counter-clockwise, without loss."""
        return np.ascontiguousarray(np.rot90(image, turns))


class CutoutPlan(NamedTuple):
    """A square to fill, in fractions of the view's side."""

    row: float  # row of its centre, in [0, 1)
    column: float  # column of its centre, in [0, 1)
    side: float


class Cutout(DeviceOperation):
    """Fill a square with one level; its centre is anywhere in the view.

    Source: DeVries and Taylor 2017, arXiv:1708.04552v2, sec. 3.2.
    """

    op: Literal["cutout"] = "cutout"
    prob: Probability = 0.5
    side: tuple[Fraction, Fraction] = (0.25, 0.5)
    """Range of the square's side, as a fraction of the view's side."""
    fill: Annotated[int, Field(ge=0, le=255)] = 124
    """Fill level; 124 is near zero after ImageNet's mean is subtracted."""
    num_params: ClassVar[int] = 3

    @model_validator(mode="after")
    def _check_order(self) -> "Cutout":
        check_ranges(self, "side")
        return self

    def draw(self, rng: np.random.Generator) -> CutoutPlan:
        """Draw the square's centre and side, all uniform in their ranges."""
        return CutoutPlan(float(rng.random()), float(rng.random()), uniform(rng, *self.side))

    def transform(self, image: Image, square: CutoutPlan) -> Image:
        """Fill the square, cut off at the border of the image."""
        height, width = image.shape[:2]
        half = square.side * min(height, width) / 2
        top, left = round(square.row * height - half), round(square.column * width - half)
        bottom, right = round(square.row * height + half), round(square.column * width + half)
        result = image.copy()
        result[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = self.fill
        return result

    def to_numbers(self, square: CutoutPlan, size_px: int) -> tuple[float, ...]:
        """Return the square's centre (row, column) and side, as fractions of the view's side."""
        return square

    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Fill the square of each image."""
        size = images.shape[2]
        row, column, side = params.T[:, :, None]  # each (N, 1)
        half, pixels = side * size / 2, np.arange(size)

        def inside(centre: Floats) -> "Tensor":
            low, high = np.rint(centre * size - half), np.rint(centre * size + half)
            return to_device((pixels >= low) & (pixels < high), images)

        square = inside(row)[:, None, :, None] & inside(column)[:, None, None, :]
        return images.masked_fill(square, float(self.fill))
