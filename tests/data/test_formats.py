"""Each row of docs/formats.md's first table, by a real encoder, compared with its picture."""

import io
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pillow_heif
import pillow_jxl
import pytest
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin

from raysl.data.decode import Flaw, decode_or_flaw
from raysl.data.header import read_header
from raysl.sources.pixels import PLAIN

assert pillow_jxl  # tells Pillow of JPEG XL
pillow_heif.register_heif_opener()

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def rows_of(heading: str) -> list[str]:
    """Return the first column of the table below a heading."""
    section = DOCS.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    return [row for row in rows if not row.startswith(("Kind", "-"))]


def _smooth(channels: int) -> Pixels:
    small = np.random.default_rng(1).integers(20, 236, (5, 7, channels), dtype=np.uint8)
    return cv2.resize(small, (48, 32), interpolation=cv2.INTER_CUBIC)  # type: ignore[return-value]


RGBA = _smooth(4)
RGB = np.ascontiguousarray(RGBA[..., :3])
GREY = np.asarray(Image.fromarray(RGB).convert("L"))
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)
PALETTE = Image.fromarray(RGB).quantize(16)
OTHER = Image.fromarray(RGB[::-1].copy())


def saved(kind: str, picture: Any = RGB, **options: Any) -> bytes:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def opencv(suffix: str, values: Any, *options: int) -> bytes:
    bgr = values if values.ndim == 2 else cv2.cvtColor(values, cv2.COLOR_RGB2BGR)
    return cv2.imencode(suffix, bgr, options)[1].tobytes()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def pillows(encoded: bytes) -> Pixels:
    """Return what the second library makes of a file."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _jpeg(**options: Any) -> bytes:
    return saved("JPEG", quality=97, subsampling=0, **options)


def _arithmetic() -> bytes:
    if shutil.which("jpegtran") is None:
        pytest.skip("no encoder of Python writes arithmetic coding; jpegtran is not installed")
    command = ["jpegtran", "-arithmetic"]
    return subprocess.run(command, input=_jpeg(), capture_output=True, check=True).stdout


def _ycck() -> bytes:
    without_ink = 255 - np.asarray(Image.fromarray(RGB).convert("CMYK"))
    encoded = simplejpeg.encode_jpeg(
        np.ascontiguousarray(without_ink), 97, colorspace="CMYK", colorsubsampling="444"
    )
    assert simplejpeg.decode_jpeg_header(encoded)[2] == "YCCK"
    return encoded


def _behind(encoded: bytes, number: int, content: bytes) -> bytes:
    """Put a segment before all others of a JPEG."""
    segment = bytes([0xFF, number]) + struct.pack(">H", len(content) + 2) + content
    return encoded[:2] + segment + encoded[2:]


def _with_bits(encoded: bytes, bits: int) -> bytes:
    """Write another depth into a JPEG's frame header."""
    at = encoded.index(b"\xff\xc0") + 4
    return encoded[:at] + bytes([bits]) + encoded[at + 1 :]


def _interlaced_png() -> bytes:
    """Write a PNG in Adam7's seven passes, which no library here writes."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    raw = b""
    for top, left, down, right in (*passes, (1, 0, 2, 1)):
        raw += b"".join(b"\0" + row.tobytes() for row in RGB[top::down, left::right])
    return _png((48, 32, 8, 2, 0, 0, 1), raw)


def _png(head: tuple[int, ...], raw: bytes) -> bytes:
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *head)), (b"IDAT", zlib.compress(raw)))
    written = b"\x89PNG\r\n\x1a\n"
    for name, data in (*chunks, (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(name + data))
        written += struct.pack(">I", len(data)) + name + data + crc
    return written


def _long_text_png() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "node " * 400_000, zip=True)
    return saved("PNG", pnginfo=text)


def _turned_jxl(orientation: int) -> bytes:
    """Give a JPEG XL a turn, which the encoder here never writes: a longer image header.

    Source: ISO 18181-1, annex D: nine bits of size, then the metadata, all of it by default.
    """
    encoded = saved("JXL", quality=97)
    plain = int.from_bytes(encoded[2:4], "little")
    bits = [plain >> n & 1 for n in range(16)]
    assert encoded[:2] == b"\xff\x0a"
    assert bits[9:] == [1, 1, 0, 0, 0, 0, 0]
    turn = [orientation - 1 >> n & 1 for n in range(3)]
    # Not by default, extra fields, the turn, nothing more of them; 8 bits; all else as it was.
    bits = [*bits[:9], 0, 1, *turn, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1]
    bits += [0] * (-len(bits) % 8)
    value = sum(bit << n for n, bit in enumerate(bits))
    return encoded[:2] + value.to_bytes(len(bits) // 8, "little") + encoded[4:]


def _pgm(maximum: int) -> bytes:
    values = np.round(GREY / 255 * maximum).astype(">u2" if maximum > 255 else "u1")
    return b"P5 # a comment\n48 32\n%d\n" % maximum + values.tobytes()


def _pam() -> bytes:
    head = b"P7\nWIDTH 48\nHEIGHT 32\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n"
    return head + RGBA.tobytes()


def _plain_text(kind: int, values: Any) -> bytes:
    text = " ".join(str(v) for v in np.asarray(values).ravel().tolist())
    return f"P{kind}\n48 32\n{'' if kind == 1 else '255 '}\n{text}\n".encode()


def _pfm() -> bytes:
    return b"PF\n48 32\n-1.0\n" + (RGB[::-1] / 255).astype("<f4").tobytes()


BITS = np.where(GREY_RGB > 127, 255, 0).astype(np.uint8)
FOUR_BITS = (GREY >> 4).astype(np.uint8)


class Row(NamedTuple):
    make: Callable[[], bytes]
    picture: Any = RGB
    """Pixels, a flaw, or ``pillows``: what the second library says."""
    levels: int = 0
    """Largest difference; of lossy formats from the picture that went in."""


ROWS = {
    "JPEG": Row(_jpeg, levels=6),
    "JPEG, progressive": Row(lambda: _jpeg(progressive=True), levels=6),
    "JPEG, arithmetic coding": Row(_arithmetic, levels=6),
    "JPEG, 4:2:0, 4:1:1 and 4:4:0": Row(
        lambda: simplejpeg.encode_jpeg(RGB, 97, colorsubsampling="411"), pillows, 1
    ),
    "JPEG, grey": Row(lambda: saved("JPEG", GREY, quality=97), GREY_RGB, 5),
    "JPEG, RGB": Row(lambda: _jpeg(keep_rgb=True), levels=5),
    "JPEG, CMYK": Row(
        lambda: saved("JPEG", Image.fromarray(RGB).convert("CMYK"), quality=97), pillows, 1
    ),
    "JPEG, YCCK": Row(_ycck, levels=8),
    "JPEG, Exif anywhere before the frame": Row(
        lambda: _behind(_behind(_jpeg(exif=exif(3)), 0xFE, b"c" * 5000), 0xE1, b"http" * 2000),
        RGB[::-1, ::-1],
        6,
    ),
    "JPEG, several pictures (MPO)": Row(
        lambda: saved("MPO", quality=97, subsampling=0, save_all=True, append_images=[OTHER]),
        levels=6,
    ),
    "JPEG, 12 bits": Row(lambda: _with_bits(_jpeg(), 12), Flaw.JPEG_KIND),
    "PNG": Row(lambda: saved("PNG")),
    "PNG, grey": Row(lambda: saved("PNG", GREY), GREY_RGB),
    "PNG, palette": Row(lambda: saved("PNG", PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "PNG, 1 to 4 bits": Row(
        lambda: _png(
            (48, 32, 4, 0, 0, 0, 0),
            b"".join(b"\0" + (row[::2] << 4 | row[1::2]).tobytes() for row in FOUR_BITS),
        ),
        np.repeat(FOUR_BITS[..., None] * np.uint8(17), 3, axis=2),
    ),
    "PNG, alpha": Row(lambda: saved("PNG", RGBA)),
    "PNG, interlaced": Row(_interlaced_png),
    "PNG, 16 bits": Row(lambda: opencv(".png", RGB.astype(np.uint16) * 256 + 255)),
    "PNG, animated": Row(lambda: saved("PNG", save_all=True, append_images=[OTHER])),
    "PNG, Exif": Row(lambda: saved("PNG", exif=exif(6)), np.rot90(RGB, -1)),
    "PNG, long text or profile": Row(_long_text_png),
    "WebP, lossy": Row(lambda: saved("WEBP", quality=95), pillows, 2),
    "WebP, lossless": Row(lambda: saved("WEBP", lossless=True)),
    "WebP, alpha": Row(lambda: saved("WEBP", RGBA, lossless=True, exact=True)),
    "WebP, Exif": Row(lambda: saved("WEBP", lossless=True, exif=exif(8)), np.rot90(RGB)),
    "WebP, animated": Row(
        lambda: saved("WEBP", lossless=True, save_all=True, append_images=[OTHER])
    ),
    "GIF": Row(lambda: saved("GIF", PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "GIF, animated": Row(
        lambda: saved("GIF", PALETTE, save_all=True, append_images=[OTHER.quantize(16)]),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "BMP": Row(lambda: saved("BMP")),
    "BMP, palette or 1 bit": Row(lambda: saved("BMP", PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "AVIF": Row(lambda: saved("AVIF", quality=100, subsampling="4:4:4"), levels=4),
    "AVIF, alpha": Row(lambda: saved("AVIF", RGBA, quality=100, subsampling="4:4:4"), levels=4),
    "AVIF, irot and imir": Row(
        lambda: saved("AVIF", quality=100, subsampling="4:4:4", exif=exif(6)),
        np.rot90(RGB, -1),
        4,
    ),
    "AVIF, 10 and 12 bits": Row(
        lambda: opencv(
            ".avif",
            RGB.astype(np.uint16) * 4,
            *(cv2.IMWRITE_AVIF_DEPTH, 10, cv2.IMWRITE_AVIF_QUALITY, 100),
        ),
        levels=4,
    ),
    "AVIF, animated": Row(
        lambda: saved(
            "AVIF", quality=100, subsampling="4:4:4", save_all=True, append_images=[OTHER]
        ),
        levels=4,
    ),
    "HEIC": Row(lambda: saved("HEIF", quality=100, chroma=444), levels=6),
    "HEIC, alpha": Row(lambda: saved("HEIF", RGBA, quality=100, chroma=444), levels=6),
    "HEIC, irot and imir": Row(
        lambda: saved("HEIF", quality=100, chroma=444, exif=exif(6)), np.rot90(RGB, -1), 6
    ),
    "JPEG XL": Row(lambda: saved("JXL", lossless=True)),
    "JPEG XL, grey or alpha": Row(lambda: saved("JXL", RGBA, lossless=True)),
    "JPEG XL, turned": Row(lambda: _turned_jxl(6), np.rot90(RGB, -1), 40),
    "JPEG 2000": Row(lambda: saved("JPEG2000")),
    "JPEG 2000, bare codestream": Row(lambda: saved("JPEG2000", no_jp2=True)),
    "JPEG 2000, grey or alpha": Row(lambda: saved("JPEG2000", RGBA)),
    "JPEG 2000, sYCC": Row(
        lambda: saved("JPEG2000", Image.fromarray(RGB).convert("YCbCr")), levels=4
    ),
    "JPEG 2000, more than 8 bits": Row(
        lambda: opencv(
            ".jp2", RGB.astype(np.uint16) * 257, cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000
        )
    ),
    "PBM": Row(lambda: saved("PPM", Image.fromarray(BITS[..., 0]).convert("1")), BITS),
    "PGM": Row(lambda: saved("PPM", GREY), GREY_RGB),
    "PPM": Row(lambda: saved("PPM")),
    "PGM and PPM, another maximum": Row(lambda: _pgm(4095), GREY_RGB),
    "PBM, PGM and PPM in plain text": Row(lambda: _plain_text(3, RGB)),
    "PAM": Row(_pam),
    "PFM": Row(_pfm),
    "PSD, ICO, TGA, PCX, SGI, DDS, QOI": Row(lambda: saved("PCX")),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_row_comes_out_as_its_picture(name: str) -> None:
    row = ROWS[name]
    encoded = row.make()
    found = decode_or_flaw(encoded, PLAIN)
    if isinstance(row.picture, Flaw):
        assert found is row.picture
        return
    expected = row.picture(encoded) if callable(row.picture) else row.picture
    assert isinstance(found, np.ndarray), found.reason
    assert found.shape == expected.shape
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= row.levels


def test_the_docs_have_a_row_for_each_and_no_other() -> None:
    assert rows_of("Photos and graphics") == list(ROWS)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, row in ROWS.items()
        if not re.search("animated|several", n) and not isinstance(row.picture, Flaw)
    ],
)
def test_a_row_cut_short_is_damaged(name: str) -> None:
    encoded = ROWS[name].make()
    assert decode_or_flaw(encoded[: len(encoded) * 3 // 4], PLAIN) is Flaw.DAMAGED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "JXL"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decoder_and_counter_follow_the_same_turn(kind: str, orientation: int) -> None:
    options = {"JPEG": {"subsampling": 0}, "HEIF": {"chroma": 444}}.get(kind, {})
    if kind == "JXL":
        encoded = _turned_jxl(orientation)
    else:
        encoded = saved(kind, quality=100, lossless=True, exif=exif(orientation), **options)
    stored = Image.fromarray(RGB)
    stored.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(stored))
    found = decode_or_flaw(encoded, PLAIN)
    assert isinstance(found, np.ndarray)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 8
    header = read_header(encoded)
    assert (header.orientation, header.width, header.height) == (orientation, 48, 32)
