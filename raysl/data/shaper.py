"""Apply ICC profiles that consist of three curves and a matrix, much faster than LittleCMS.

Most profiles of photographs are of this kind: Adobe RGB, Display P3, cameras, screens. ``color.py``
uses a shaper only if its result agrees with that of LittleCMS.
"""

import struct
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from raysl.augment.crop import Image

_Floats = npt.NDArray[np.float64]

_TAGS_AT, _FIRST_TAG = 128, 132
_CURVES, _COLORANTS = (b"rTRC", b"gTRC", b"bTRC"), (b"rXYZ", b"gXYZ", b"bXYZ")
_TABLE = b"A2B0"  # a lookup table, which takes precedence over curves and matrix
# XYZ of sRGB's red, green and blue under the profile illuminant D50. Source: IEC 61966-2-1, adapted
# with Bradford's matrix, as in the ICC's sRGB profile.
_SRGB = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)
_WHITE = 65_535
# Strips small enough for the cache, in a reused buffer: four times as fast as whole images.
_STRIP_PIXELS = 16_384
# Number of parameters (g, a, b, c, d, e, f) of each "para" curve type, ICC.1:2010 sec. 10.16.
_NUM_PARAMETERS = (1, 3, 4, 5, 7)


class Shaper(NamedTuple):
    """The transform of a profile's colours to sRGB."""

    curves: npt.NDArray[np.uint16]
    """Linear light of each level, where 65,535 is white: ``(1, 256)``, or ``(1, 256, 3)`` for one
    curve per channel."""
    matrix: npt.NDArray[np.float32]
    """``(3, 3)``: from linear light to linear sRGB."""

    def apply(self, image: Image) -> Image:
        """Convert an image ``(H, W, 3)`` uint8 to sRGB in place and return it."""
        rows = max(1, _STRIP_PIXELS // image.shape[1])
        for top in range(0, len(image), rows):
            image[top : top + rows] = self._apply(image[top : top + rows])
        return image

    def _apply(self, image: Image) -> Any:
        light: Any = cv2.transform(cv2.LUT(image, self.curves), self.matrix)  # rounds and clips
        try:
            return cv2.LUT(light, _SRGB_LEVELS[None])
        except cv2.error:  # before OpenCV 5, lookup tables have at most 256 entries
            return np.take(_SRGB_LEVELS, light)


def read_shaper(profile: bytes) -> Shaper | None:
    """Return curves and matrix of an RGB profile, or None if it is of another kind."""
    try:
        tags = _tags(profile)
        if _TABLE in tags:
            return None
        curves = np.stack([_curve(tags[name]) for name in _CURVES], axis=-1)
        colorants = np.stack([_xyz(tags[name]) for name in _COLORANTS], axis=-1)
    except (KeyError, struct.error, ValueError):
        return None
    light = np.rint(np.clip(curves, 0, 1) * _WHITE).astype(np.uint16)[None]
    if (light == light[..., :1]).all():  # one table for all channels is a third faster than three
        light = np.ascontiguousarray(light[..., 0])
    return Shaper(light, (np.linalg.inv(_SRGB) @ colorants).astype(np.float32))


def _tags(profile: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", profile, _TAGS_AT)
    places = struct.iter_unpack(">4sII", profile[_FIRST_TAG : _FIRST_TAG + 12 * min(count, 100)])
    return {name: profile[at : at + size] for name, at, size in places}


def _xyz(tag: bytes) -> _Floats:
    return np.array(struct.unpack_from(">3i", tag, 8)) / 65_536


def _curve(tag: bytes) -> _Floats:
    """Return the linear light of levels 0 to 255."""
    levels = np.arange(256) / 255
    if tag[:4] == b"para":
        return _parametric(tag, levels)
    (count,) = struct.unpack_from(">I", tag, 8)
    if tag[:4] != b"curv" or count == 0:
        if tag[:4] == b"curv":
            return levels
        raise ValueError("an unsupported kind of curve")
    values = np.array(struct.unpack_from(f">{count}H", tag, 12), dtype=np.float64)
    if count == 1:
        return levels ** (values[0] / 256)  # type: ignore[no-any-return]
    return np.interp(levels, np.linspace(0, 1, count), values / _WHITE)


def _parametric(tag: bytes, levels: _Floats) -> _Floats:
    (kind,) = struct.unpack_from(">H", tag, 8)
    if kind >= len(_NUM_PARAMETERS):
        raise ValueError("an unsupported kind of curve")
    number = _NUM_PARAMETERS[kind]
    values = [value / 65_536 for value in struct.unpack_from(f">{number}i", tag, 12)]
    g, a, b, c, d, e, f = values + [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0][number:]
    if kind in (1, 2):  # black up to -b/a, then an offset of c
        d, e, f, c = -b / a if a else 0.0, c, c, 0.0
        e = f = e if kind == 2 else 0.0
    power = np.maximum(a * levels + b, 0) ** g + e
    result: _Floats = np.where(levels >= d, power, c * levels + f)
    return result


def _srgb_levels() -> npt.NDArray[np.uint8]:
    """Return the sRGB level of each of 65,536 steps of linear light."""
    light = np.arange(_WHITE + 1) / _WHITE
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    encoded: npt.NDArray[np.uint8] = np.rint(255 * levels).astype(np.uint8)
    return encoded


_SRGB_LEVELS = _srgb_levels()
