"""Decode an image file to uint8 RGB pixels.

This module decides every conversion. docs/formats.md lists what each format is converted to, and
what is refused.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import simplejpeg

from raysl.augment.crop import Image
from raysl.data.color import to_rgb
from raysl.data.flaw import Flaw, flaw_of_other_file
from raysl.data.header import read_header, read_jpeg
from raysl.data.header_fields import Header
from raysl.data.netpbm import read_netpbm
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
from raysl.errors import DecodeError
from raysl.sources.pixels import PLAIN, Decoding, Pages
from raysl.sources.source import Encoded, Unreadable

__all__ = ["JPEG_SHRINKS", "Flaw", "decode", "decode_or_flaw", "flaw_error", "value_range"]

_SIGNATURE_BYTES = 4
_JPEG = b"\xff\xd8\xff"
# Factors by which libjpeg-turbo can downscale while decoding.
JPEG_SHRINKS = (2, 4, 8)
_CUT_SHORT = "premature end"  # in libjpeg-turbo's message about a truncated file
# From this short side on, JPEG chroma is upsampled by repeating pixels, which saves 0.1 ms.
_REPEAT_CHROMA_FROM_PX = 256
_SWAPS_SIDES_FROM = 5  # EXIF orientations from this one on swap width and height

Shrink = Callable[[int, int], int]


def decode(encoded: Encoded | memoryview, how: Decoding = PLAIN, *, where: str) -> Image:
    """Decode one image, or raise.

    Args:
        encoded: The bytes of an image file, or its decoded pixels.
        how: The decoding settings of the source.
        where: Name of the image for the error message.

    Returns:
        ``(H, W, 3)`` uint8 RGB.

    Raises:
        DecodeError: If the bytes are not a complete, supported image.
    """
    result = decode_or_flaw(encoded, how)
    if isinstance(result, Flaw):
        raise flaw_error(result, encoded, where=where)
    return result


def flaw_error(flaw: Flaw, encoded: Encoded | memoryview, *, where: str) -> DecodeError:
    """Build the error that names a bad image and its flaw."""
    if isinstance(encoded, Unreadable):
        return DecodeError(f"{where}: {encoded.reason}; remove it, or set data.bad_images.policy")
    first_bytes = bytes(encoded[:_SIGNATURE_BYTES]).hex() or "nothing"
    return DecodeError(
        f"{where} ({len(encoded):,} bytes, begins with {first_bytes}): {flaw.reason}; remove or "
        f"replace it, or set data.bad_images.policy"
    )


def decode_or_flaw(
    encoded: Encoded | memoryview,
    how: Decoding,
    *,
    max_pixels: float = float("inf"),
    shrink: Shrink | None = None,
) -> Image | Flaw:
    """Decode one image, or return the reason why it cannot be decoded.

    Args:
        encoded: The bytes of an image file, or decoded pixels, ``(H, W)`` or ``(H, W, 3)`` uint8.
        how: The decoding settings of the source.
        max_pixels: Images with more pixels are refused.
        shrink: Called with the height and width of a JPEG after its rotation. Returns the factor to
            downscale by while decoding: 1 or one of ``JPEG_SHRINKS``. Sides are rounded up.

    Returns:
        ``(H, W, 3)`` uint8 RGB, upright, or the flaw. Grey, palette and CMYK images are converted;
        an alpha channel is dropped without changing the colours; values of more than 8 bits are
        scaled by ``how.intensity``; ``how.color_profile`` says whether colours with a profile are
        converted. An animation yields its first frame. A truncated JPEG is bad; one with other
        defects that decoders tolerate is not.
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
    """Return the value range of an image with more than 8 bits, before any scaling.

    Args:
        encoded: The bytes of an image file, or its decoded pixels.
        how: The decoding settings of the source.
        max_pixels: An image with more pixels counts as bad.

    Returns:
        The image's lowest and highest value, and the values that map to black and white by default.
        None for 8-bit and bad images.
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
    """Decode a JPEG: with libjpeg-turbo if it has one or three channels of 8 bits.

    Calling libjpeg-turbo directly is a fifth faster than OpenCV, and it detects truncated files.
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
            # Above this size the views downscale the image, which smooths the chroma anyway.
            fastupsample=min(header.height, header.width) >= _REPEAT_CHROMA_FROM_PX,
            min_height=size[0],
            min_width=size[1],
            min_factor=factor,
        )
    except ValueError as error:
        cut = _CUT_SHORT in str(error).lower()
        return Flaw.DAMAGED if cut else _defective_jpeg(encoded, header, how, size)
    if header.orientation == 1 and not header.profile:
        return image
    return _finish(_jpeg_samples(image, header), how)


def _jpeg_samples(image: Image, header: Header) -> Samples:
    grey = image.shape[2] == 1
    return Samples(
        image[..., 0] if grey else image,
        "grey" if grey else "rgb",
        orientation=header.orientation,
        profile=header.profile if grey or header.color == "rgb" else b"",
    )


def _defective_jpeg(
    encoded: bytes | memoryview, header: Header, how: Decoding, size: tuple[int, int]
) -> Image | Flaw:
    """Decode a JPEG that libjpeg-turbo rejects to ``size``, with other libraries."""
    samples = _read(encoded, header, how.pages, float("inf"))
    if isinstance(samples, Flaw):
        return samples
    if samples.values.shape[:2] != size:
        smaller = cv2.resize(samples.values, size[::-1], interpolation=cv2.INTER_AREA)
        samples = samples._replace(values=smaller)
    return _finish(samples, how)


def _upright(header: Header) -> tuple[int, int]:
    """Return height and width after the EXIF rotation."""
    if header.orientation >= _SWAPS_SIDES_FROM:
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
    """Decode a file of any format to its stored values."""
    if header.format == "unknown":
        flaw = flaw_of_other_file(encoded)
        if flaw is not Flaw.NOT_AN_IMAGE:
            return flaw
        return rare_with_pillow(encoded, header, max_pixels)
    if header.format == "camera raw":
        return Flaw.CAMERA_RAW
    if header.width * header.height > max_pixels:
        return Flaw.TOO_LARGE
    if not header.width:
        # Some headers need the format's own library, such as an AVIF that has tracks but no items.
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
            decoder = with_heif if header.format == "heic" else with_jxl
            return decoder(encoded, header)
        case "jpeg" if header.bits != 8 or not header.color:
            return Flaw.JPEG_KIND
    for library in _libraries(header):
        samples = library(encoded, header)
        if samples is not None:
            return samples
    return Flaw.DAMAGED


def _libraries(header: Header) -> Sequence[Callable[..., Samples | None]]:
    """Return the decoders to try, the most accurate one first.

    OpenCV is faster and keeps more than 8 bits. But it swaps red and blue of an AVIF with alpha,
    reads the sYCC of a JPEG 2000 as RGB, and cannot convert CMYK by its profile.
    """
    if header.format == "jpeg 2000" and header.bits > 8:
        return _deep_jpeg_2000, with_pillow
    if header.format == "avif" and "alpha" in header.color:
        return (with_pillow,)
    if header.format in ("avif", "gif", "jpeg 2000") or header.color == "cmyk":
        return with_pillow, with_opencv
    return with_opencv, with_pillow


def _deep_jpeg_2000(encoded: bytes | memoryview, header: Header) -> Samples | None:
    """Decode a JPEG 2000 of more than 8 bits; the values keep their bit depth."""
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
    """Scale the values, rotate the image, convert its colours: in this order for every format."""
    image = to_8_bits(samples, how.intensity)
    if isinstance(image, Flaw):
        return image
    turned = _turn(image, samples.orientation)
    return to_rgb(turned, samples.color, samples.profile, how.color_profile)


def _turn(pixels: Image, orientation: int) -> Image:
    """Rotate or mirror uint8 pixels ``(H, W)`` or ``(H, W, C)`` to be upright.

    Args:
        pixels: The pixels as stored.
        orientation: An EXIF orientation, 1 to 8; any other value changes nothing.

    Source: CIPA DC-008 (Exif 2.32), sec. 4.6.4, tag 0x0112.
    """
    match orientation:
        case 2:
            return cv2.flip(pixels, 1)  # type: ignore[return-value]
        case 3:
            return cv2.rotate(pixels, cv2.ROTATE_180)  # type: ignore[return-value]
        case 4:
            return cv2.flip(pixels, 0)  # type: ignore[return-value]
        case 5 | 6 | 7 | 8:
            return _swap_sides(pixels, orientation)
    return pixels


def _swap_sides(pixels: Image, orientation: int) -> Image:
    # OpenCV's flip codes: 0 mirrors top to bottom, 1 left to right, -1 both.
    turned = cv2.transpose(pixels)
    flips = {5: None, 6: 1, 7: -1, 8: 0}[orientation]
    return turned if flips is None else cv2.flip(turned, flips)  # type: ignore[return-value]
