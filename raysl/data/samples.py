"""The values of an image as stored, and their scaling to 8 bits."""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.augment.crop import Image
from raysl.data.flaw import Flaw
from raysl.sources.pixels import Bits, Intensity, Percentiles

Values = npt.NDArray[Any]
Color = Literal["grey", "rgb", "cmyk", "channels"]

# Half an 8-bit level: how far interpolation and compression may push values outside of [0, 1].
_OVERSHOOT = 0.5 / 255
_WHITE = 255.0


class Samples(NamedTuple):
    """The stored values of an image, and what they mean."""

    values: Values
    """``(H, W)`` or ``(H, W, C)``: integers or floating point numbers."""
    color: Color
    """The meaning of the channels; in CMYK, 0 means no ink."""
    full: tuple[float, float] | None = None
    """The values of black and white that the file declares. None means the full range of an integer
    type, and 0 to 1 for floating point numbers."""
    orientation: int = 1
    """The EXIF orientation that is still to be applied, 1 to 8."""
    profile: bytes = b""
    """The ICC profile."""


def full_range(samples: Samples) -> tuple[float, float]:
    """Return the values that map to black and white by default."""
    if samples.full is not None:
        return samples.full
    if samples.values.dtype.kind == "f":
        return 0.0, 1.0
    limits = np.iinfo(samples.values.dtype)
    return float(limits.min), float(limits.max)


def to_8_bits(samples: Samples, intensity: Intensity | None) -> Image | Flaw:
    """Scale values of more than 8 bits to uint8; 8-bit values are returned unchanged.

    By default, integers that fill their type keep their upper eight bits. All others become ``255
    (v - low) / (high - low)`` in float32, rounded and clipped; NaN becomes black.

    Args:
        samples: ``(H, W)`` or ``(H, W, C)`` of any type.
        intensity: The setting ``data.intensity``.

    Returns:
        uint8 of the same shape; ``Flaw.FLOAT_RANGE`` for floating point values outside of their
        range without the setting.
    """
    values = samples.values
    if values.dtype == np.uint8 and samples.full is None:
        return values
    if intensity is not None and values.dtype != np.uint8:
        return _scale(values, *_range_by_setting(samples, intensity))
    low, high = full_range(samples)
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        margin = _OVERSHOOT * (high - low)
        if finite.size and not (low - margin <= finite.min() and finite.max() <= high + margin):
            return Flaw.FLOAT_RANGE
    elif samples.full is None:
        return _upper_8_bits(values)
    return _scale(values, low, high)


def _range_by_setting(samples: Samples, intensity: Intensity) -> tuple[Any, Any]:
    """Return the values of black and white by the setting: scalars, or one value per channel."""
    if isinstance(intensity, Bits):
        return 0.0, 2.0**intensity.bits - 1
    if isinstance(intensity, Percentiles):
        # Unrelated channels get a range each. Colours share one: separate ranges would tint them.
        axes = (0, 1) if samples.color == "channels" else None
        with np.errstate(all="ignore"):
            low, high = np.nanpercentile(samples.values, intensity.percentile, axis=axes)
        return low, high
    return intensity


def _upper_8_bits(values: Values) -> Image:
    limits = np.iinfo(values.dtype)
    shift = limits.bits - 8
    if limits.min < 0:  # signed: the lowest value is black
        return ((values >> shift) + 128).astype(np.uint8)
    return (values >> shift).astype(np.uint8)


def _scale(values: Values, low: Any, high: Any) -> Image:
    # float32 is too coarse for 32-bit integers and float64 in a narrow range far from zero.
    exact = values.dtype.itemsize > 2 and values.dtype != np.float32
    kind = np.float64 if exact else np.float32
    span = np.subtract(high, low, dtype=np.float64)
    factor = np.divide(_WHITE, span, out=np.zeros_like(span), where=span != 0)
    result = (values.astype(kind) - np.asarray(low, kind)) * factor.astype(kind)
    np.nan_to_num(result, copy=False, nan=0.0, posinf=_WHITE, neginf=0.0)
    image: Image = np.clip(np.rint(result), 0, _WHITE).astype(np.uint8)
    return image
