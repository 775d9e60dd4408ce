"""Read an image file's header: format, size, colours, orientation, profile, pages.

The decoder and ``raysl data`` both use this reader. It decodes no pixels.
"""

import struct
import zlib
from collections.abc import Callable

from raysl.data.header_boxes import read_heif, read_jp2, read_jxl
from raysl.data.header_fields import Header, exif_orientation
from raysl.data.header_tiff import tiff_header
from raysl.data.netpbm import read_netpbm_header

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),  # BigTIFF
    (b"MM\0+", "tiff"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jpeg xl"),
    (b"\xff\x0a", "jpeg xl"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg 2000"),
    (b"\xff\x4f\xff\x51", "jpeg 2000"),
)
# Major brands of ISO 14496-12 files: bytes 8 to 12, after the box type "ftyp".
_BRANDS = {b"avif": "avif", b"avis": "avif"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif"), "heic"
)
_NETPBM = (*(b"P%d" % kind for kind in range(1, 8)), b"PF", b"Pf")

_PNG_COLORS = {0: "grey", 2: "rgb", 3: "palette", 4: "grey alpha", 6: "rgb alpha"}
_JPEG_COLORS = {1: "grey", 3: "rgb", 4: "cmyk"}
# Start-of-frame markers: C0 to CF without the tables C4, C8 and CC, and JPEG-LS.
_FRAMES = (frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {0xF7}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_JPEG_LS = 0xF7
_EXIF, _ICC = b"Exif\0\0", b"ICC_PROFILE\0"
_SEARCHED_BYTES = 1 << 16
_MOST_PROFILE_BYTES = 8 << 20


def read_header(data: bytes | memoryview) -> Header:
    """Read the header of an image file.

    Args:
        data: The file's bytes, or a sufficient prefix.

    Returns:
        The fields that the format stores. A damaged header yields only the format.
    """
    kind = _format_of(data)
    if kind is None:
        return Header("unknown")
    try:
        return _READERS[kind](memoryview(data))
    except (struct.error, IndexError, ValueError, zlib.error):
        return Header(kind)


def _format_of(data: bytes | memoryview) -> str | None:
    begin = bytes(data[:16])
    for signature, name in _SIGNATURES:
        if begin.startswith(signature):
            return name
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return "webp"
    if begin[4:8] == b"ftyp":
        return _format_of_brands(data)
    if begin[:2] in _NETPBM and begin[2:3] in b" \t\r\n#" and begin[2:3]:
        return "netpbm"
    return None


def _format_of_brands(data: bytes | memoryview) -> str | None:
    """Return the format of the major brand; AVIF if that is generic and AVIF is compatible."""
    size = min(int.from_bytes(data[:4], "big"), 256)
    major = bytes(data[8:12])
    compatible = [bytes(data[at : at + 4]) for at in range(16, size - 3, 4)]
    if major in (b"mif1", b"msf1") and {b"avif", b"avis"} & set(compatible):
        return "avif"
    return _BRANDS.get(major)


def read_jpeg(data: bytes | memoryview) -> Header:
    """Read a JPEG's orientation, profile, size and colours, up to its frame header.

    Source: ITU-T T.81, annex B; ICC specification, annex B.4, for the chunks of a profile.
    """
    at, end, orientation = 2, len(data), 1
    parts: list[tuple[int, bytes]] = []
    while at + 4 <= end:
        if data[at] != 0xFF:  # stray bytes between segments: decoders skip them
            skipped = bytes(data[at : at + _SEARCHED_BYTES]).find(b"\xff")
            if skipped < 0:
                break
            at += skipped
            continue
        marker = data[at + 1]
        # Fill bytes, and markers that have no length field.
        if marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            color = _JPEG_COLORS.get(channels, "") if marker != _JPEG_LS else ""
            profile = b"".join(part for _, part in sorted(parts)) if parts else b""
            return Header(
                "jpeg",
                width,
                height,
                color,
                bits,
                orientation,
                marker in _PROGRESSIVE,
                profile=profile,
            )
        if marker == 0xE1 and bytes(data[at + 4 : at + 10]) == _EXIF:
            orientation = exif_orientation(memoryview(data)[at + 10 : at + 2 + length])
        elif marker == 0xE2 and bytes(data[at + 4 : at + 16]) == _ICC:
            parts.append((data[at + 16], bytes(data[at + 18 : at + 2 + length])))
        at += 2 + length
    return Header("jpeg", orientation=orientation)


def _png(data: memoryview) -> Header:
    width, height, bits, kind = struct.unpack_from(">IIBB", data, 16)
    color, orientation, profile, at = _PNG_COLORS.get(kind, ""), 1, b"", 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, content = bytes(data[at + 4 : at + 8]), data[at + 8 : at + 8 + length]
        if name == b"tRNS":
            color += " alpha"
        elif name == b"eXIf":
            orientation = exif_orientation(content)
        elif name == b"iCCP":
            profile = _unpacked_profile(bytes(content))
        elif name == b"IDAT":
            break
        at += 12 + length
    return Header("png", width, height, color, max(bits, 8), orientation, profile=profile)


def _unpacked_profile(chunk: bytes) -> bytes:
    """Return the profile in a PNG's iCCP chunk: a name, a zero, the method, deflated bytes."""
    try:
        return zlib.decompressobj().decompress(chunk[chunk.index(0) + 2 :], _MOST_PROFILE_BYTES)
    except (ValueError, zlib.error):
        return b"damaged"


def _webp(data: memoryview) -> Header:
    kind = bytes(data[12:16])
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        orientation, profile = _webp_chunks(data)
        color = "rgb alpha" if data[20] & 0x10 else "rgb"
        return Header("webp", width, height, color, orientation=orientation, profile=profile)
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        color = "rgb alpha" if packed >> 28 & 1 else "rgb"
        return Header("webp", 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF), color)
    width, height = struct.unpack_from("<HH", data, 26)
    return Header("webp", width & 0x3FFF, height & 0x3FFF, "rgb")


def _webp_chunks(data: memoryview) -> tuple[int, bytes]:
    """Return the orientation and the profile of an extended WebP."""
    orientation, profile, at = 1, b"", 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        content = data[at + 8 : at + 8 + length]
        match bytes(data[at : at + 4]):
            case b"ICCP":
                profile = bytes(content)
            case b"EXIF":
                has_prefix = bytes(content[:6]) == _EXIF  # some writers keep JPEG's prefix
                orientation = exif_orientation(content[6:] if has_prefix else content)
        at += 8 + length + length % 2
    return orientation, profile


def _bmp(data: memoryview) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:  # the OS/2 variant
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
    else:
        width, height, _, bits = struct.unpack_from("<iiHH", data, 18)
    color = {32: "rgb alpha", 24: "rgb", 16: "rgb"}.get(bits, "palette")
    return Header("bmp", width, abs(height), color)


def _gif(data: memoryview) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("gif", width, height, "palette")


_READERS: dict[str, Callable[[memoryview], Header]] = {
    "jpeg": read_jpeg,
    "png": _png,
    "webp": _webp,
    "bmp": _bmp,
    "tiff": tiff_header,
    "gif": _gif,
    "avif": lambda data: read_heif(data, "avif"),
    "heic": lambda data: read_heif(data, "heic"),
    "jpeg xl": read_jxl,
    "jpeg 2000": read_jp2,
    "netpbm": read_netpbm_header,
}
