"""Convert grey, CMYK, CIELab and ICC-profiled colours to sRGB."""

import importlib
import io
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from raysl.augment.crop import Image
from raysl.data.samples import Color
from raysl.data.shaper import Shaper, read_shaper
from raysl.sources.pixels import ColorProfile

_CACHED_PROFILES = 64
_MODES = {"grey": "L", "rgb": "RGB", "cmyk": "CMYK"}
_SPACES = {"grey": "GRAY", "rgb": "RGB", "cmyk": "CMYK"}
_LATTICE = 9  # grid points per channel at which a profile is compared with sRGB
_SAME_LEVELS = 1  # largest difference at which two colours count as equal
_LONGEST_NAME = 60
BROKEN = "broken"


def to_rgb(image: Image, color: Color, profile: bytes, how: ColorProfile) -> Image:
    """Convert an image to sRGB.

    Args:
        image: ``(H, W)`` or ``(H, W, C)`` uint8; may be overwritten. In CMYK, 0 means no ink.
        color: The meaning of the channels.
        profile: An ICC profile, or empty bytes.
        how: Whether to convert the colours by the profile, or to ignore it.

    Returns:
        ``(H, W, 3)`` uint8. LittleCMS converts, with perceptual intent. A damaged profile, or one
        for another colour space than the image's, is ignored.
    """
    if profile and how == "convert" and color in _MODES:
        transform = _transform(bytes(profile), color)
        if transform is not None:
            return _apply(transform, image, color)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]
    if color == "cmyk":
        without_ink = cv2.bitwise_not(image)
        black = cv2.cvtColor(without_ink[..., 3], cv2.COLOR_GRAY2RGB)
        return cv2.multiply(np.ascontiguousarray(without_ink[..., :3]), black, scale=1 / 255)  # type: ignore[return-value]
    return image


def lab_to_rgb(picture: Any) -> Image:
    """Convert a Pillow image in CIELab to sRGB ``(H, W, 3)``."""
    cms = importlib.import_module("PIL.ImageCms")
    lab, srgb = cms.createProfile("LAB"), cms.createProfile("sRGB")
    return np.array(cms.profileToProfile(picture, lab, srgb, outputMode="RGB"))


def profile_name(profile: bytes) -> str:
    """Return the profile's description, or ``broken`` if LittleCMS rejects it."""
    return _profile_name(bytes(profile))


@lru_cache(_CACHED_PROFILES)
def _profile_name(profile: bytes) -> str:
    cms = importlib.import_module("PIL.ImageCms")
    try:
        opened = cms.ImageCmsProfile(io.BytesIO(profile))
        name = str(opened.profile.profile_description or "without a name")
    except Exception:  # damaged profiles raise undocumented exceptions
        return BROKEN
    return " ".join(name.split())[:_LONGEST_NAME]


@lru_cache(_CACHED_PROFILES)
def _transform(profile: bytes, color: Color) -> Any | None:
    """Return the transform to sRGB, or None if the profile is unusable or already sRGB."""
    cms = importlib.import_module("PIL.ImageCms")  # imported lazily: most images have no profile
    try:
        opened = cms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != _SPACES[color]:
            return None
        transform = cms.buildTransform(opened, cms.createProfile("sRGB"), _MODES[color], "RGB")
        if color == "cmyk":
            return transform
        before = _lattice(color)
        after = _apply(transform, before, color)
        if _same(after, before if color == "rgb" else np.repeat(before[..., None], 3, axis=2)):
            return None
        shaper = read_shaper(profile) if color == "rgb" else None
        return (
            shaper
            if shaper is not None and _same(shaper.apply(before.copy()), after)
            else transform
        )
    except Exception:  # as above: a damaged profile does not make an image bad
        return None


def _lattice(color: Color) -> Image:
    """Return sample colours: all greys ``(1, N)``, or a grid of RGB colours ``(1, N, 3)``."""
    levels = np.arange(256, dtype=np.uint8)
    if color == "grey":
        return np.ascontiguousarray(levels[None])
    steps = np.linspace(0, 255, _LATTICE).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    greys = np.repeat(levels[:, None], 3, axis=1)
    return np.ascontiguousarray(np.concatenate([cube, greys])[None])


def _same(one: Image, other: Image) -> bool:
    return bool(np.abs(one.astype(np.int16) - other).max() <= _SAME_LEVELS)


def _apply(transform: Any, image: Image, color: Color) -> Image:
    if isinstance(transform, Shaper):
        return transform.apply(image)
    pil = importlib.import_module("PIL.Image")
    mode, (height, width) = _MODES[color], image.shape[:2]
    data = np.ascontiguousarray(image)
    picture = pil.frombuffer(mode, (width, height), data, "raw", mode, 0, 1)
    return np.array(transform.apply(picture))
