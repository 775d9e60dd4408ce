"""An image's values as its file holds them, and the one way from them to 8 bits."""

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.augment.crop import Image
from raysl.data.flaw import Flaw
from raysl.sources.pixels import Bits, Intensity, Percentiles

Values = npt.NDArray[Any]
Color = Literal["grey", "rgb", "cmyk", "channels"]

# Half a level of 8 bits: what interpolation and compression add to [0, 1].
_OVERSHOOT = 0.5 / 255
_WHITE = 255.0


class Samples(NamedTuple):
    """Values and what they mean."""

    values: Values
    """``(H, W)`` or ``(H, W, C)``: integers or floating point numbers."""
    color: Color
    """What the channels are; of cmyk, 0 is no ink."""
    full: tuple[float, float] | None = None
    """What the file declares as black and white; None: the whole range of its integers, and 0 to 1
    of floating point numbers."""
    orientation: int = 1
    """The turn that is still to be made."""
    profile: bytes = b""
    """The ICC profile of the colours."""


def full_range(samples: Samples) -> tuple[float, float]:
    """Return what becomes black and white where no setting says otherwise."""
    if samples.full is not None:
        return samples.full
    if samples.values.dtype.kind == "f":
        return 0.0, 1.0
    limits = np.iinfo(samples.values.dtype)
    return float(limits.min), float(limits.max)


def to_8_bits(samples: Samples, intensity: Intensity | None) -> Image | Flaw:
    """Return values of more than 8 bits as uint8; those of 8 bits stay as they are.

    Without a setting, integers that fill their type keep their upper eight bits. Everything else is
    ``255 (v - low) / (high - low)`` in float32, rounded and clipped; what is no number is black.

    Args:
        samples: ``(H, W)`` or ``(H, W, C)`` of any type.
        intensity: The setting ``data.intensity``.

    Returns:
        uint8 of the same shape, or the flaw of floating point numbers that need the setting.
    """
    values = samples.values
    if values.dtype == np.uint8 and samples.full is None:
        return values
    if intensity is not None and values.dtype != np.uint8:
        return _scaled(values, *_asked(samples, intensity))
    low, high = full_range(samples)
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        margin = _OVERSHOOT * (high - low)
        if finite.size and not (low - margin <= finite.min() and finite.max() <= high + margin):
            return Flaw.FLOAT_RANGE
    elif samples.full is None:
        return _upper_eight(values)
    return _scaled(values, low, high)


def _asked(samples: Samples, intensity: Intensity) -> tuple[Any, Any]:
    """Return the values that become black and white: numbers, or one of each channel."""
    if isinstance(intensity, Bits):
        return 0.0, 2.0**intensity.bits - 1
    if isinstance(intensity, Percentiles):
        # Channels that are no colours have ranges of their own; scaling colours apart tints them.
        axes = (0, 1) if samples.color == "channels" else None
        with np.errstate(all="ignore"):
            low, high = np.nanpercentile(samples.values, intensity.percentile, axis=axes)
        return low, high
    return intensity


def _upper_eight(values: Values) -> Image:
    limits = np.iinfo(values.dtype)
    shift = limits.bits - 8
    if limits.min < 0:  # the lowest value is black
        return ((values >> shift) + 128).astype(np.uint8)
    return (values >> shift).astype(np.uint8)


def _scaled(values: Values, low: Any, high: Any) -> Image:
    # 32-bit integers and float64 lose in float32 what a narrow range far from zero would show.
    exact = values.dtype.itemsize > 2 and values.dtype != np.float32
    kind = np.float64 if exact else np.float32
    span = np.subtract(high, low, dtype=np.float64)
    factor = np.divide(_WHITE, span, out=np.zeros_like(span), where=span != 0)
    result = (values.astype(kind) - np.asarray(low, kind)) * factor.astype(kind)
    np.nan_to_num(result, copy=False, nan=0.0, posinf=_WHITE, neginf=0.0)
    image: Image = np.clip(np.rint(result), 0, _WHITE).astype(np.uint8)
    return image
