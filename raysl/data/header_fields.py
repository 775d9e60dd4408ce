"""The fields of an image file's header, and how EXIF stores the orientation."""

import struct
from typing import NamedTuple

_ORIENTATION, _SHORT = 274, 3


class Header(NamedTuple):
    """The header of an image file. A field is 0 or "" if the file omits it or is damaged."""

    format: str
    """jpeg, png, webp, bmp, tiff, gif, avif, heic, jpeg xl, jpeg 2000, netpbm, camera raw, or
    unknown."""
    width: int = 0
    """Width in pixels, as stored: before the rotation."""
    height: int = 0
    """Height in pixels, as stored: before the rotation."""
    color: str = ""
    """grey, rgb, palette, cmyk, lab or channels, then " alpha" if there is an alpha channel."""
    bits: int = 8
    """Bits per channel; 8 if there are fewer."""
    orientation: int = 1
    """The EXIF orientation, 1 to 8; 1 is upright."""
    progressive: bool = False
    """Whether it is a progressive JPEG, which takes about three times as long to decode."""
    is_float: bool = False
    """Whether the values are floating point numbers."""
    pages: int = 1
    """Number of pages of a TIFF, without those marked as smaller copies of others."""
    profile: bytes = b""
    """The ICC profile."""


def exif_orientation(exif: memoryview) -> int:
    """Return the orientation in EXIF data; 1 if it is missing or the data are damaged.

    Source: CIPA DC-008 (Exif 2.32), sec. 4.5.4 and 4.6.4: a TIFF header and its first directory.
    """
    order = "<" if bytes(exif[:2]) == b"II" else ">"
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(
                    order + ("H" if kind == _SHORT else "I"), exif, entry + 8
                )
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
