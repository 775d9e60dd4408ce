"""Describe how much of their value range images of more than 8 bits use."""

from collections.abc import Sequence
from typing import NamedTuple

# An image that uses less than this share of its range gets at most 6 bits of grey levels.
_LITTLE = 0.25
_OVERSHOOT = 0.5 / 255


class ValueRange(NamedTuple):
    """The value range of one image, before any scaling."""

    low: float
    """The lowest value."""
    high: float
    """The highest value."""
    black: float
    """The value that becomes 0 by default."""
    white: float
    """The value that becomes 255 by default."""
    is_float: bool = False

    @property
    def is_outside(self) -> bool:
        """Whether floating point values are below black or above white: then the image is bad."""
        margin = _OVERSHOOT * (self.white - self.black)
        beyond = self.low < self.black - margin or self.high > self.white + margin
        return self.is_float and beyond

    @property
    def is_little(self) -> bool:
        """Whether the image uses so little of its range that it gets only few levels."""
        low = self.black if self.black == 0 else self.low
        return (self.high - low) < _LITTLE * (self.white - self.black)


def range_advice(ranges: Sequence[ValueRange]) -> list[str]:
    """Return advice on images whose values do not fit the default black and white.

    Args:
        ranges: Value ranges of images of more than 8 bits for which ``data.intensity`` is not set.

    Returns:
        Up to two sentences; empty if the defaults fit.
    """
    lines = []
    outside = [r for r in ranges if r.is_outside]
    if outside:
        low, high = min(r.low for r in outside), max(r.high for r in outside)
        lines.append(
            f"{len(outside):,} of {len(ranges):,} images of more than 8 bits hold floating point "
            f"numbers from {low:,.6g} to {high:,.6g}, which is not the range 0 to 1: they count as "
            f"broken until you set data.intensity=[{low:.6g}, {high:.6g}], or {{percentile: [0.5, "
            f"99.5]}} of each image."
        )
    little = [r for r in ranges if r.is_little and not r.is_outside]
    if 2 * len(little) > len(ranges) - len(outside):
        lines.append(_little_used(little, of=len(ranges)))
    return lines


def _little_used(little: Sequence[ValueRange], *, of: int) -> str:
    high = max(r.high for r in little)
    low, black = min(r.low for r in little), little[0].black
    white = max(r.white for r in little)
    level = min(255, int(256 * (high - black) / (white - black + 1)))
    if black < 0 or little[0].is_float:
        cure = f"data.intensity=[{low:.6g}, {high:.6g}]"
        look = "nearly grey" if black < 0 else "nearly dark"
    else:
        cure = f"data.intensity={{bits: {max(1, int(high).bit_length())}}} or [low, high]"
        look = f"nearly dark (no level above {level} of 255)"
    return (
        f"{len(little):,} of {of:,} images of more than 8 bits use little of their range: the "
        f"highest value seen is {high:,.6g} of {white:,.6g}, so that they come out {look}; set "
        f"{cure}, or {{percentile: [0.5, 99.5]}} of each image."
    )
