"""Encoded bytes to uint8 RGB pixels: the one place that decides.

What is read, turned, scaled, converted and refused stands in docs/formats.md, a row a format.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import simplejpeg

from raysl.augment.crop import Image
from raysl.data.color import to_rgb
from raysl.data.flaw import Flaw
from raysl.data.header import read_header, read_jpeg
from raysl.data.header_fields import Header
from raysl.data.other_files import kind_of_other_file
from raysl.data.read_netpbm import read_netpbm
from raysl.data.read_tiff import read_tiff
from raysl.data.readers import (
    rare_with_pillow,
    size_by_pillow,
    stored_values,
    with_heif,
    with_jxl,
    with_opencv,
    with_pillow,
)
from raysl.data.samples import Samples, full_range, to_8_bits
from raysl.data.turn import SWAPS_SIDES_FROM, turn
from raysl.errors import DecodeError
from raysl.sources.pixels import PLAIN, Decoding, Pages
from raysl.sources.source import Encoded, Unreadable

__all__ = ["JPEG_SHRINKS", "Flaw", "decode", "decode_or_flaw", "flaw_error", "value_range"]

_SIGNATURE_BYTES = 4
_JPEG = b"\xff\xd8\xff"
# Factors by which libjpeg-turbo shrinks while it decodes, in quick code.
JPEG_SHRINKS = (2, 4, 8)
_CUT_SHORT = "premature end"
# From this short side on, the halved colour of a JPEG is enlarged by repetition: 0.1 ms less.
_COARSE_COLOR_FROM_PX = 256

Shrink = Callable[[int, int], int]


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
    shrink: Shrink | None = None,
) -> Image | Flaw:
    """Decode one image, or say why not.

    Args:
        encoded: The bytes of an image file, or pixels that need no decoding, ``(H, W)`` or
            ``(H, W, 3)`` uint8.
        how: What the source's settings say of its images.
        max_pixels: An image of more pixels is not decoded.
        shrink: Called with a JPEG's height and width, upright; returns 1 or one of
            ``JPEG_SHRINKS``, by which it is decoded to smaller sides, rounded up, in less time.

    Returns:
        ``(H, W, 3)`` uint8 RGB, upright, or the flaw. Grey, palette and CMYK images are converted,
        an alpha channel is dropped and the colour below it kept; more than 8 bits are scaled as
        ``how.intensity`` says, colours with a profile converted to sRGB as ``how.color_profile``
        says. A JPEG that is cut short is damaged; one with other oddities that decoders forgive is
        not. Of an animation, the first frame.
    """
    if isinstance(encoded, Unreadable):
        return Flaw.UNREADABLE
    if isinstance(encoded, np.ndarray):
        return encoded if encoded.ndim == 3 else cv2.cvtColor(encoded, cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]
    if not len(encoded):
        return Flaw.EMPTY
    if encoded[:3] == _JPEG:
        return _decode_jpeg(encoded, how, max_pixels, shrink)
    return _decode_file(encoded, read_header(encoded), how, max_pixels)


def value_range(
    encoded: Encoded | memoryview, how: Decoding, *, max_pixels: float = float("inf")
) -> tuple[float, float, float, float] | None:
    """Return what an image of more than 8 bits has for values, before any scaling.

    Returns:
        Its lowest and highest value, and the values that are black and white without a setting;
        None for other images and bad ones.
    """
    if isinstance(encoded, Unreadable | np.ndarray) or not len(encoded):
        return None
    header = read_header(encoded)
    if header.bits <= 8 and not header.is_float:
        return None
    samples = _read(encoded, header, how.pages, max_pixels)
    if isinstance(samples, Flaw) or samples.values.dtype == np.uint8:
        return None
    finite = samples.values[np.isfinite(samples.values)]
    if not finite.size:
        return None
    return float(finite.min()), float(finite.max()), *full_range(samples)


def _decode_jpeg(
    encoded: bytes | memoryview, how: Decoding, max_pixels: float, shrink: Shrink | None
) -> Image | Flaw:
    """Decode a JPEG of three channels or one by libjpeg-turbo itself, any other as other files.

    It is a fifth quicker than through OpenCV, and says what is cut short.
    """
    header = read_jpeg(encoded)
    if not (header.height and header.width):
        return Flaw.DAMAGED
    if header.height * header.width > max_pixels:
        return Flaw.TOO_LARGE
    if header.color not in ("rgb", "grey") or header.bits != 8:
        return _decode_file(encoded, header, how, max_pixels)
    factor = 1 if shrink is None else shrink(*_upright(header))
    size = -(-header.height // factor), -(-header.width // factor)
    as_grey = header.color == "grey" and header.profile and how.color_profile == "convert"
    try:
        image: Image = simplejpeg.decode_jpeg(
            encoded,
            "GRAY" if as_grey else "RGB",
            # Views shrink large images, which smooths their colour enough.
            fastupsample=min(header.height, header.width) >= _COARSE_COLOR_FROM_PX,
            min_height=size[0],
            min_width=size[1],
            min_factor=factor,
        )
    except ValueError as error:
        cut = _CUT_SHORT in str(error).lower()
        return Flaw.DAMAGED if cut else _forgiven_jpeg(encoded, header, how, size)
    if header.orientation == 1 and not header.profile:
        return image
    return _finish(_of_jpeg(image, header), how)


def _of_jpeg(image: Image, header: Header) -> Samples:
    grey = image.shape[2] == 1
    return Samples(
        image[..., 0] if grey else image,
        "grey" if grey else "rgb",
        orientation=header.orientation,
        profile=header.profile if grey or header.color == "rgb" else b"",
    )


def _forgiven_jpeg(
    encoded: bytes | memoryview, header: Header, how: Decoding, size: tuple[int, int]
) -> Image | Flaw:
    """Decode with other libraries what libjpeg-turbo refuses, to the size that was asked of it."""
    samples = _read(encoded, header, how.pages, float("inf"))
    if isinstance(samples, Flaw):
        return samples
    if samples.values.shape[:2] != size:
        smaller = cv2.resize(samples.values, size[::-1], interpolation=cv2.INTER_AREA)
        samples = samples._replace(values=smaller)
    return _finish(samples, how)


def _upright(header: Header) -> tuple[int, int]:
    """Return height and width once it is turned."""
    if header.orientation >= SWAPS_SIDES_FROM:
        return header.width, header.height
    return header.height, header.width


def _decode_file(
    encoded: bytes | memoryview, header: Header, how: Decoding, max_pixels: float
) -> Image | Flaw:
    samples = _read(encoded, header, how.pages, max_pixels)
    return samples if isinstance(samples, Flaw) else _finish(samples, how)


def _read(
    encoded: bytes | memoryview, header: Header, pages: Pages, max_pixels: float
) -> Samples | Flaw:
    """Decode any file to its values."""
    if header.format == "unknown":
        other = kind_of_other_file(encoded)
        if other is not Flaw.NOT_AN_IMAGE:
            return other
        return rare_with_pillow(encoded, header, max_pixels)
    if header.format == "camera raw":
        return Flaw.CAMERA_RAW
    if header.width * header.height > max_pixels:
        return Flaw.TOO_LARGE
    if not header.width:
        # Some headers only the format's library can follow, such as an AVIF of nothing but tracks.
        size = size_by_pillow(encoded)
        if size is not None and size[0] * size[1] > max_pixels:
            return Flaw.TOO_LARGE
    return _read_by_format(encoded, header, pages)


def _read_by_format(encoded: bytes | memoryview, header: Header, pages: Pages) -> Samples | Flaw:
    match header.format:
        case "tiff":
            return read_tiff(encoded, header, pages)
        case "netpbm":
            return read_netpbm(encoded)
        case "heic" | "jpeg xl":
            extra = with_heif if header.format == "heic" else with_jxl
            return extra(encoded, header)
        case "jpeg" if header.bits != 8 or not header.color:
            return Flaw.JPEG_KIND
    for library in _libraries(header):
        samples = library(encoded, header)
        if samples is not None:
            return samples
    return Flaw.DAMAGED


def _libraries(header: Header) -> Sequence[Callable[..., Samples | None]]:
    """Return who decodes a file, first the one that makes least of it otherwise than it is.

    OpenCV exchanges red and blue of an AVIF with alpha, takes the sYCC of a JPEG 2000 for RGB, and
    has no inks to convert by their profile; it is quicker, and reads the values above 8 bits.
    """
    if header.format == "jpeg 2000" and header.bits > 8:
        return _deep_jpeg_2000, with_pillow
    if header.format == "avif" and "alpha" in header.color:
        return (with_pillow,)
    if header.format in ("avif", "gif", "jpeg 2000") or header.color == "cmyk":
        return with_pillow, with_opencv
    return with_opencv, with_pillow


def _deep_jpeg_2000(encoded: bytes | memoryview, header: Header) -> Samples | None:
    """Decode more than 8 bits of a JPEG 2000: the values as they are, of so many bits."""
    values = stored_values(encoded)
    if values is None or values.dtype != np.uint16:
        return None
    full = None if header.bits == 16 else (0.0, 2.0**header.bits - 1)
    if values.ndim == 2:
        return Samples(values, "grey", full, profile=header.profile)
    if values.shape[2] < 3:
        return Samples(np.ascontiguousarray(values[..., 0]), "grey", full, profile=header.profile)
    colors = np.ascontiguousarray(values[..., :3])
    return Samples(colors, "rgb", full, profile=header.profile)


def _finish(samples: Samples, how: Decoding) -> Image | Flaw:
    """Scale, turn, convert: in this order, for every format."""
    image = to_8_bits(samples, how.intensity)
    if isinstance(image, Flaw):
        return image
    turned = turn(image, samples.orientation)
    return to_rgb(turned, samples.color, samples.profile, how.color_profile)
