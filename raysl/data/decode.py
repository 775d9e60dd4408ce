"""Encoded bytes to uint8 RGB pixels."""

import enum
import importlib
import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg

from raysl.augment.crop import Image
from raysl.errors import DecodeError
from raysl.sources.pixels import PLAIN, Decoding
from raysl.sources.source import Encoded, Unreadable

_SIGNATURE_BYTES = 4
_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_EXIF_WITHIN_BYTES = 4096
_ORIENTATION = 0x0112
# Factors by which libjpeg-turbo shrinks while it decodes, in quick code.
JPEG_SHRINKS = (2, 4, 8)
_PLAIN_COLORS = ("YCbCr", "Gray", "RGB")
_CUT_SHORT = "premature end"
# From this short side on, the halved colour of a JPEG is enlarged by repetition: 0.1 ms less.
_COARSE_COLOR_FROM_PX = 256


class Flaw(enum.IntEnum):
    """Why an image is bad."""

    EMPTY = 1
    NOT_AN_IMAGE = 2
    DAMAGED = 3
    TOO_LARGE = 4
    UNREADABLE = 5

    @property
    def reason(self) -> str:
        """Say it to a person."""
        return {
            Flaw.EMPTY: "no bytes",
            Flaw.NOT_AN_IMAGE: "not an image of a known format",
            Flaw.DAMAGED: "damaged: cut short, or its data do not decode",
            Flaw.UNREADABLE: "cannot be read",
            Flaw.TOO_LARGE: "more pixels than data.bad_images.max_megapixels",
        }[self]


def decode(encoded: Encoded | memoryview, how: Decoding = PLAIN, *, where: str) -> Image:
    """Decode one image, or raise.

    Args:
        encoded: As for :func:`decode_or_flaw`.
        how: As for the same.
        where: Name of the image for the error message.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        DecodeError: If the bytes are not a whole image.
    """
    result = decode_or_flaw(encoded, how)
    if isinstance(result, Flaw):
        raise flaw_error(result, encoded, where=where)
    return result


def flaw_error(flaw: Flaw, encoded: Encoded | memoryview, *, where: str) -> DecodeError:
    """Return the error that names a bad image and says what is wrong with it."""
    if isinstance(encoded, Unreadable):
        return DecodeError(f"{where}: {encoded.reason}; remove it, or set data.bad_images.policy")
    begins = bytes(encoded[:_SIGNATURE_BYTES]).hex() or "nothing"
    return DecodeError(
        f"{where} ({len(encoded):,} bytes, begins with {begins}): {flaw.reason}; remove or "
        f"replace it, or set data.bad_images.policy"
    )


def decode_or_flaw(
    encoded: Encoded | memoryview,
    how: Decoding,
    *,
    max_pixels: float = float("inf"),
    shrink: Callable[[int, int], int] | None = None,
) -> Image | Flaw:
    """Decode one image, or say why not.

    Args:
        encoded: A JPEG, PNG, WebP, BMP or TIFF file's bytes, or pixels that need no decoding,
            ``(H, W)`` or ``(H, W, 3)`` uint8.
        how: What the source's settings say of its images.
        max_pixels: An image of more pixels is not decoded.
        shrink: Called with a plain JPEG's height and width; returns 1 or one of ``JPEG_SHRINKS``,
            by which it is decoded to smaller sides, rounded up, in less time.

    Returns:
        ``(H, W, 3)`` uint8 RGB, turned as its EXIF orientation says, or the flaw. Grey, palette,
        CMYK and 16-bit images are converted, an alpha channel is dropped. A JPEG that is cut short
        is damaged; one with other oddities that decoders forgive is not.
    """
    if isinstance(encoded, Unreadable):
        return Flaw.UNREADABLE
    if isinstance(encoded, np.ndarray):
        return encoded if encoded.ndim == 3 else cv2.cvtColor(encoded, cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]
    if not len(encoded):
        return Flaw.EMPTY
    if bytes(encoded[:3]) == _JPEG:
        result = _decode_plain_jpeg(encoded, max_pixels, shrink)
        if result is not None:
            return result
    return _decode_any(encoded, max_pixels)


def _decode_plain_jpeg(
    encoded: bytes | memoryview, max_pixels: float, shrink: Callable[[int, int], int] | None
) -> Image | Flaw | None:
    """Decode an upright JPEG of three channels or one, or return None for any other.

    libjpeg-turbo by itself is a fifth quicker than through OpenCV, and it says what is cut short.
    """
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(encoded)
        if color not in _PLAIN_COLORS or _exif_orientation(encoded) != 1:
            return None
        if height * width > max_pixels:
            return Flaw.TOO_LARGE
        factor = 1 if shrink is None else shrink(height, width)
        return simplejpeg.decode_jpeg(  # type: ignore[no-any-return]
            encoded,
            "RGB",
            # Views shrink large images, which smooths their colour enough.
            fastupsample=min(height, width) >= _COARSE_COLOR_FROM_PX,
            min_height=-(-height // factor),
            min_width=-(-width // factor),
            min_factor=factor,
        )
    except ValueError as error:
        return Flaw.DAMAGED if _CUT_SHORT in str(error).lower() else None


def _decode_any(encoded: bytes | memoryview, max_pixels: float) -> Image | Flaw:
    picture = _open_with_pillow(encoded)
    if isinstance(picture, Flaw):
        return picture
    if picture.width * picture.height > max_pixels:
        return Flaw.TOO_LARGE
    try:
        image = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is not None:
            return image  # type: ignore[return-value]
        # Formats that this OpenCV was built without, such as GIF.
        operations = importlib.import_module("PIL.ImageOps")
        return np.array(operations.exif_transpose(picture).convert("RGB"))
    except Exception:  # what a damaged file makes a decoder raise is not documented
        return Flaw.DAMAGED


def _open_with_pillow(encoded: bytes | memoryview) -> Any:
    """Return Pillow's image, of which only the header is read, or the flaw."""
    pil = importlib.import_module("PIL.Image")  # late: JPEGs, most images by far, do without
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pil.open(io.BytesIO(encoded))
    except pil.DecompressionBombError:
        return Flaw.TOO_LARGE
    except pil.UnidentifiedImageError:
        return Flaw.NOT_AN_IMAGE
    except Exception:  # on bytes that only begin like a format
        return Flaw.DAMAGED


def _exif_orientation(encoded: bytes | memoryview) -> int:
    """Return the orientation that a JPEG's EXIF block gives, 1 to 8; 1, upright, without one.

    Source: CIPA DC-008 (Exif 2.32), sec. 4.5.4 and 4.6.4: a TIFF header and its first directory.
    """
    head = bytes(encoded[:_EXIF_WITHIN_BYTES])
    start = head.find(_EXIF) + len(_EXIF)
    if start < len(_EXIF):
        return 1
    order = "<" if head[start : start + 2] == b"II" else ">"
    try:
        (offset,) = struct.unpack_from(order + "I", head, start + 4)
        (count,) = struct.unpack_from(order + "H", head, start + offset)
        for entry in range(count):
            at = start + offset + 2 + 12 * entry
            tag, value = struct.unpack_from(order + "H6xH", head, at)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:  # cut off: OpenCV reads it whole
        return 0
    return 1
