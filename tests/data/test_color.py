"""Colour profiles: what LittleCMS makes of them is what comes out, within a level."""

import io
import struct
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from raysl.data import color
from raysl.data.decode import decode_or_flaw
from raysl.data.header import read_header
from raysl.data.shaper import Shaper, read_shaper
from raysl.sources.pixels import PLAIN, Decoding

IGNORE = Decoding(color_profile="ignore")
_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
_ADOBE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
_SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
_D50 = (0.9642, 1.0, 0.8249)
SRGB_CURVE = (3, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))


def _fixed(values: Any) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def _table(power: float) -> bytes:
    values = np.round(65535 * np.linspace(0, 1, 256) ** power).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", 256) + values.tobytes()


def _parametric(kind: int, values: Any) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + _fixed(values)


def profile_of(
    primaries: Any, curve: bytes, name: str = "a test", *, space: bytes = b"RGB "
) -> bytes:
    """Write an ICC profile of version 2 or, with parametric curves, 4."""
    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50),
    }
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, xyz in zip(b"rgb", primaries, strict=True):
            tags[bytes([letter]) + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(xyz)
            tags[bytes([letter]) + b"TRC"] = curve
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = start + len(data)
    head = struct.pack(">I", size) + bytes(4) + bytes.fromhex("02400000") + b"mntr" + space
    head += b"XYZ " + bytes(12) + b"acsp" + bytes(28) + _fixed(_D50)
    return head.ljust(128, b"\0") + table + data


P3 = profile_of(_P3, _parametric(*SRGB_CURVE), "Display P3")
ADOBE = profile_of(_ADOBE, _gamma(2.19921875), "Adobe RGB (1998)")
SAME = profile_of(_SRGB, _parametric(*SRGB_CURVE), "sRGB of a camera")
GREY_GAMMA = profile_of((), _gamma(1.8), "Gray Gamma 1.8", space=b"GRAY")
_CURVES = {
    "gamma": _gamma(2.2),
    "table": _table(1.8),
    "straight": b"curv\0\0\0\0\0\0\0\0",
    "parametric 0": _parametric(0, (2.2,)),
    "parametric 1": _parametric(1, (2.4, 0.95, 0.05)),
    "parametric 2": _parametric(2, (2.4, 0.9, 0.05, 0.03)),
    "parametric 3": _parametric(*SRGB_CURVE),
    "parametric 4": _parametric(4, (2.4, 0.9, 0.05, 0.07, 0.04, 0.02, 0.01)),
}


def _picture() -> Any:
    small = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (64, 48), interpolation=cv2.INTER_LINEAR)


def saved(kind: str, profile: bytes, picture: Any = None, **options: Any) -> bytes:
    picture = Image.fromarray(_picture()) if picture is None else picture
    file = io.BytesIO()
    picture.save(file, kind, icc_profile=profile, **options)
    return file.getvalue()


def littlecms(encoded: bytes, profile: bytes) -> Any:
    picture = Image.open(io.BytesIO(encoded))
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(picture, opened, srgb, outputMode="RGB"))


def apart(one: Any, other: Any) -> int:
    assert isinstance(one, np.ndarray)
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("profile", [P3, ADOBE])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 98, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_every_format_is_converted_as_littlecms_does(
    kind: str, options: dict[str, Any], profile: bytes
) -> None:
    encoded = saved(kind, profile, **options)
    expected = littlecms(encoded, profile)
    # libjpeg's versions differ by a level, which dark saturated colours spread.
    assert apart(decode_or_flaw(encoded, PLAIN), expected) <= (6 if kind == "JPEG" else 1)
    stored = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert apart(decode_or_flaw(encoded, IGNORE), stored) <= 3
    assert apart(stored, expected) > 10


@pytest.mark.parametrize("curve", _CURVES)
def test_curves_and_matrix_give_what_littlecms_gives(curve: str) -> None:
    profile = profile_of(_ADOBE, _CURVES[curve])
    encoded = saved("PNG", profile)
    assert apart(decode_or_flaw(encoded, PLAIN), littlecms(encoded, profile)) <= 1
    assert isinstance(read_shaper(profile), Shaper)


def test_a_profile_that_is_srgb_leaves_every_pixel() -> None:
    encoded = saved("PNG", SAME)
    np.testing.assert_array_equal(decode_or_flaw(encoded, PLAIN), _picture())
    assert color._transform(SAME, "rgb") is None


def test_a_profile_in_many_parts_is_put_together() -> None:
    long = ADOBE + bytes(150_000)  # a JPEG's segment holds 65,519 bytes of it
    long = struct.pack(">I", len(long)) + long[4:]
    encoded = saved("JPEG", long)
    assert read_header(encoded).profile == long


def test_a_grey_profile_changes_greys_and_one_of_rgb_leaves_them() -> None:
    grey = Image.fromarray(_picture()).convert("L")
    for kind in ("PNG", "JPEG", "TIFF"):
        encoded = saved(kind, GREY_GAMMA, grey)
        assert apart(decode_or_flaw(encoded, PLAIN), littlecms(encoded, GREY_GAMMA)) <= 2
        encoded = saved(kind, ADOBE, grey)
        stored = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        assert apart(decode_or_flaw(encoded, PLAIN), stored) <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("profile", [b"no profile at all", ADOBE[:200], bytes(400)])
def test_a_broken_profile_makes_no_bad_image(kind: str, profile: bytes) -> None:
    encoded = saved(kind, profile)
    ignored = decode_or_flaw(encoded, IGNORE)
    assert isinstance(ignored, np.ndarray)
    np.testing.assert_array_equal(decode_or_flaw(encoded, PLAIN), ignored)
    assert color.profile_name(profile) == color.BROKEN


def test_a_turned_and_shrunk_jpeg_is_converted_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = saved("JPEG", P3, quality=98, subsampling=0, exif=exif)
    asked: list[tuple[int, int]] = []
    found = decode_or_flaw(encoded, PLAIN, shrink=lambda h, w: asked.append((h, w)) or 2)
    assert asked == [(64, 48)]
    whole = decode_or_flaw(encoded, PLAIN)
    assert isinstance(whole, np.ndarray)
    small = cv2.resize(whole, (24, 32), interpolation=cv2.INTER_AREA)
    assert isinstance(found, np.ndarray)
    assert found.shape == small.shape
    assert np.abs(found.astype(int) - small).mean() < 4


def test_names_are_the_profiles_own() -> None:
    assert color.profile_name(P3) == "Display P3"
    assert color.profile_name(ADOBE) == "Adobe RGB (1998)"
