"""What the first bytes of an image file say: its format, its size, its colours. Decodes nothing."""

import struct
from typing import NamedTuple

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jpeg xl"),
    (b"\xff\x0a", "jpeg xl"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg 2000"),
)
# ISO 14496-12: bytes 4 to 8 of an "ftyp" box, then the brand.
_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic"}

_PNG_COLORS = {0: "grey", 2: "rgb", 3: "palette", 4: "grey alpha", 6: "rgb alpha"}
_JPEG_COLORS = {1: "grey", 3: "rgb", 4: "cmyk"}
# Start-of-frame markers: C0 to CF but the tables C4, C8 and CC; those of progressive ones.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 256, 257, 258, 262, 274, 277
_SHORT = 3
_TIFF_COLORS = {0: "grey", 1: "grey", 2: "rgb", 3: "palette", 5: "cmyk", 6: "rgb"}


class Header(NamedTuple):
    """What a file's header says; 0 or "" is what it does not say, or where it is damaged."""

    format: str
    """jpeg, png, webp, bmp, tiff, gif, ... or unknown."""
    width: int = 0
    """Pixels, as stored: before the EXIF turn."""
    height: int = 0
    color: str = ""
    """grey, rgb, palette or cmyk, and "alpha" behind it."""
    bits: int = 8
    """Of one channel."""
    orientation: int = 1
    """Of EXIF, 1 to 8; 1 is upright."""
    progressive: bool = False
    """A JPEG in several passes, which takes some three times as long to decode."""


def read_header(data: bytes | memoryview) -> Header:
    """Read the header of an image file.

    Args:
        data: The file's bytes, or enough of its beginning.

    Returns:
        What is known. A damaged header gives the format alone.
    """
    begin = bytes(data[:16])
    kind = next((name for signature, name in _SIGNATURES if begin.startswith(signature)), None)
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        kind = "webp"
    elif begin[4:8] == b"ftyp":
        kind = _BRANDS.get(begin[8:12])
    if kind is None:
        return Header("unknown")
    read = {"jpeg": _jpeg, "png": _png, "webp": _webp, "bmp": _bmp, "tiff": _tiff, "gif": _gif}
    try:
        return read[kind](memoryview(data)) if kind in read else Header(kind)
    except (struct.error, IndexError):
        return Header(kind)


def _jpeg(data: memoryview) -> Header:
    at, orientation = 2, 1
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # fill bytes, marks without a length
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == 0xE1 and bytes(data[at + 4 : at + 10]) == b"Exif\0\0":
            orientation = _orientation(data[at + 10 : at + 2 + length])
        elif marker in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            color = _JPEG_COLORS.get(channels, "")
            return Header("jpeg", width, height, color, bits, orientation, marker in _PROGRESSIVE)
        at += 2 + length
    return Header("jpeg", orientation=orientation)


def _png(data: memoryview) -> Header:
    width, height, bits, kind = struct.unpack_from(">IIBB", data, 16)
    color, orientation, at = _PNG_COLORS.get(kind, ""), 1, 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name = bytes(data[at + 4 : at + 8])
        if name == b"tRNS":
            color += " alpha"
        elif name == b"eXIf":
            orientation = _orientation(data[at + 8 : at + 8 + length])
        elif name == b"IDAT":
            break
        at += 12 + length
    return Header("png", width, height, color, max(bits, 8), orientation)


def _webp(data: memoryview) -> Header:
    kind = bytes(data[12:16])
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        return Header("webp", width, height, "rgb alpha" if data[20] & 0x10 else "rgb")
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        color = "rgb alpha" if packed >> 28 & 1 else "rgb"
        return Header("webp", 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF), color)
    width, height = struct.unpack_from("<HH", data, 26)
    return Header("webp", width & 0x3FFF, height & 0x3FFF, "rgb")


def _bmp(data: memoryview) -> Header:
    width, height, _, bits = struct.unpack_from("<iiHH", data, 18)
    color = {32: "rgb alpha", 24: "rgb"}.get(bits, "palette")
    return Header("bmp", width, abs(height), color)


def _gif(data: memoryview) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("gif", width, height, "palette")


def _tiff(data: memoryview) -> Header:
    tags = _directory(data)
    color = _TIFF_COLORS.get(tags.get(_PHOTOMETRIC, -1), "")
    if color and tags.get(_SAMPLES, 1) in (2, 4) and color != "cmyk":
        color += " alpha"
    width, height = tags.get(_WIDTH, 0), tags.get(_HEIGHT, 0)
    bits = max(tags.get(_BITS, 8), 8)
    return Header("tiff", width, height, color, bits, tags.get(_ORIENTATION, 1))


def _orientation(exif: memoryview) -> int:
    """Return the orientation of EXIF data; damaged ones say nothing, and the image stands."""
    try:
        value = _directory(exif).get(_ORIENTATION, 1)
    except (struct.error, IndexError):
        return 1
    return value if 1 <= value <= 8 else 1


def _directory(data: memoryview) -> dict[int, int]:
    """Return the tags of a TIFF's first directory by number: of each its first value."""
    order = "<" if bytes(data[:2]) == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    tags: dict[int, int] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
        place = entry + 8
        if kind == _SHORT and number > 2:  # too long for the entry, which then says where it lies
            (place,) = struct.unpack_from(order + "I", data, place)
        (tags[tag],) = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), data, place)
    return tags
