"""Decode files with OpenCV, Pillow and its plugins.

A reader returns None if its library refuses a file. Another library may read that file, so one
refusal does not make an image bad.
"""

import importlib
import io
import warnings
from typing import Any

import cv2
import numpy as np

from raysl.data.color import lab_to_rgb
from raysl.data.flaw import Flaw
from raysl.data.header_fields import Header
from raysl.data.samples import Color, Samples, Values

# Formats that Pillow may open if the signature is unknown. PostScript is not one of them, because
# Pillow would start another program to read it.
_RARE = ("PSD", "ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "SUN", "QOI", "XPM", "BLP", "DIB")
_ORIENTATION = 0x0112
_GREY_MODES = ("1", "L", "LA", "La")
_FLAGS = cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_ANYDEPTH

Encoded = bytes | memoryview


def with_opencv(encoded: Encoded, header: Header) -> Samples | None:
    """Decode with OpenCV: three channels without alpha, up to 16 bits."""
    values = _imdecode(encoded, _FLAGS | cv2.IMREAD_COLOR_RGB)
    if values is None or values.ndim != 3 or values.shape[2] != 3:
        return None
    color: Color = "rgb"
    if header.color.startswith("grey"):
        values, color = np.ascontiguousarray(values[..., 0]), "grey"
    return Samples(values, color, orientation=header.orientation, profile=header.profile)


def stored_values(encoded: Encoded) -> Values | None:
    """Decode with OpenCV to the stored values of any type, in the channel order RGB(A)."""
    values = _imdecode(encoded, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if values is not None and values.ndim == 3 and values.shape[2] >= 3:
        order = [2, 1, 0, *range(3, values.shape[2])]
        return np.ascontiguousarray(values[..., order])
    return values


def _imdecode(encoded: Encoded, flags: int) -> Values | None:
    try:
        return cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), flags)
    except Exception:  # damaged files raise undocumented exceptions
        return None


def with_pillow(encoded: Encoded, header: Header) -> Samples | None:
    """Decode the first frame with Pillow."""
    picture = _open(encoded)
    return None if isinstance(picture, Flaw) else pillow_samples(picture, header)


def rare_with_pillow(encoded: Encoded, header: Header, max_pixels: float) -> Samples | Flaw:
    """Decode a file with an unknown signature, if Pillow supports it."""
    picture = _open(encoded, _RARE)
    if isinstance(picture, Flaw):
        return picture
    if picture.width * picture.height > max_pixels:
        return Flaw.TOO_LARGE
    return pillow_samples(picture, header) or Flaw.DAMAGED


def size_by_pillow(encoded: Encoded) -> tuple[int, int] | None:
    """Return width and height of a file whose header ``header.py`` cannot read; None if damaged."""
    picture = _open(encoded)
    return None if isinstance(picture, Flaw) else picture.size


def _open(encoded: Encoded, formats: tuple[str, ...] | None = None) -> Any | Flaw:
    pil = importlib.import_module("PIL.Image")  # imported lazily: JPEGs do not need it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pil.open(io.BytesIO(encoded), formats=formats)
    except pil.DecompressionBombError:
        return Flaw.TOO_LARGE
    except pil.UnidentifiedImageError:
        return Flaw.NOT_AN_IMAGE
    except Exception:  # the bytes only start like a known format
        return Flaw.DAMAGED


def pillow_samples(picture: Any, header: Header) -> Samples | None:
    """Return the values of an image that Pillow opened, or None if it cannot be decoded."""
    values: Values
    color: Color
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.load()
            mode = picture.mode
            if mode in _GREY_MODES:
                values, color = np.array(_without_alpha(picture, "L")), "grey"
            elif mode == "CMYK":
                values, color = np.array(picture), "cmyk"
            elif mode == "LAB":
                values, color = lab_to_rgb(picture), "rgb"
            elif mode == "F" or mode.startswith("I"):
                values, color = np.array(picture), "grey"
                values = values.astype(values.dtype.newbyteorder("="))
            else:
                values, color = np.array(_without_alpha(picture, "RGB")), "rgb"
    except Exception:  # damaged files raise undocumented exceptions
        return None
    profile = b"" if mode == "LAB" else header.profile
    # Newer versions of Pillow rotate a TIFF while loading and remove its orientation tag.
    orientation = (
        picture.getexif().get(_ORIENTATION, 1) if header.format == "tiff" else header.orientation
    )
    return Samples(values, color, orientation=orientation, profile=profile)


def _without_alpha(picture: Any, mode: str) -> Any:
    """Convert an image to a mode without alpha; premultiplied colours are divided by it."""
    if picture.mode in ("RGBa", "La"):
        picture = picture.convert({"RGBa": "RGBA", "La": "LA"}[picture.mode])
    return picture.convert(mode)


def with_heif(encoded: Encoded, header: Header) -> Samples | Flaw:
    """Decode a HEIC with pillow-heif, which rotates it and reduces it to 8 bits."""
    try:
        library = importlib.import_module("pillow_heif")  # optional dependency, imported lazily
    except ImportError:
        return Flaw.NEEDS_HEIF
    try:
        picture = library.open_heif(bytes(encoded), convert_hdr_to_8bit=True)
        values = np.array(picture)
    except Exception:  # damaged files raise undocumented exceptions
        return Flaw.DAMAGED
    if values.ndim == 2:
        return Samples(values, "grey", profile=header.profile)
    return Samples(np.ascontiguousarray(values[..., :3]), "rgb", profile=header.profile)


def with_jxl(encoded: Encoded, header: Header) -> Samples | Flaw:
    """Decode a JPEG XL with pillow-jxl-plugin; the profile is that of the plugin's output."""
    try:
        importlib.import_module("pillow_jxl")  # optional; registers the format with Pillow
    except ImportError:
        return Flaw.NEEDS_JXL
    picture = _open(encoded)
    if isinstance(picture, Flaw):
        return Flaw.DAMAGED
    profile = picture.info.get("icc_profile") or b""
    return pillow_samples(picture, header._replace(orientation=1, profile=profile)) or Flaw.DAMAGED
