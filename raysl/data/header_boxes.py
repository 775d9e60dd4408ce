"""Read the headers of formats that consist of ISO boxes: AVIF, HEIC, JPEG 2000, JPEG XL."""

import struct
from collections.abc import Iterator

from raysl.data.header_fields import Header

_FULL = 4  # bytes of version and flags at the start of a "full" box
# EXIF orientation of a rotation (irot), by its number of counter-clockwise quarter turns. A mirror
# (imir) after it swaps top and bottom (0) or left and right (1): the orientation of both together.
_TURNS = {0: 1, 1: 8, 2: 3, 3: 6}
_MIRRORED = {
    0: {1: 4, 8: 5, 3: 2, 6: 7},
    1: {1: 2, 8: 7, 3: 4, 6: 5},
}


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the name and content of each box. Source: ISO 14496-12, sec. 4.2."""
    at = 0
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        size = size or len(data) - at
        if size < head:
            return
        yield bytes(data[at + 4 : at + 8]), data[at + head : at + size]
        at += size


def _box(data: memoryview, name: bytes) -> memoryview:
    """Return the content of the first box of this name; raise ValueError if there is none."""
    content = next((content for kind, content in _boxes(data) if kind == name), None)
    if content is None:
        raise ValueError(f"no box {name!r}")
    return content


def read_heif(data: memoryview, kind: str) -> Header:
    """Read the header of an AVIF or HEIC from the properties of its primary item.

    Source: ISO 23008-12 (HEIF), sec. 6.5, 9.3 and 9.2.4 to 9.2.6.
    """
    meta = _box(data, b"meta")[_FULL:]
    primary = _box(meta, b"pitm")
    item = int.from_bytes(primary[4:6] if primary[0] == 0 else primary[4:8], "big")
    properties = _box(meta, b"iprp")
    all_properties = list(_boxes(_box(properties, b"ipco")))
    width, height, bits, profile = 0, 0, 8, b""
    turns, mirror, aperture = 0, None, None
    numbers = _property_numbers(_box(properties, b"ipma"), item)
    for name, content in [all_properties[number - 1] for number in numbers]:
        match name:
            case b"ispe":
                width, height = struct.unpack_from(">II", content, _FULL)
            case b"clap" if kind == "heic":  # the visible part of a padded picture
                width_n, width_d, height_n, height_d = struct.unpack_from(">4I", content)
                aperture = width_n // width_d, height_n // height_d
            case b"pixi":
                bits = max(content[_FULL + 1 : _FULL + 1 + content[_FULL]], default=8)
            case b"irot":
                turns = content[0] & 3
            case b"imir":
                mirror = content[0] & 1
            case b"colr" if bytes(content[:4]) in (b"prof", b"rICC"):
                profile = bytes(content[4:])
    orientation = _TURNS[turns]  # applied before the mirror, whatever their order in the list
    orientation = orientation if mirror is None else _MIRRORED[mirror][orientation]
    color = "rgb alpha" if _has_alpha(all_properties) else "rgb"
    width, height = aperture or (width, height)
    return Header(kind, width, height, color, max(bits, 8), orientation, profile=profile)


def _property_numbers(table: memoryview, wanted: int) -> list[int]:
    """Return the numbers of an item's properties, counted from 1, in order."""
    version, wide = table[0], table[3] & 1
    (count,) = struct.unpack_from(">I", table, _FULL)
    at = _FULL + 4
    for _ in range(count):
        size = 2 if version < 1 else 4
        item = int.from_bytes(table[at : at + size], "big")
        number = table[at + size]
        at += size + 1
        width = 2 if wide else 1
        entries = [
            int.from_bytes(table[a : a + width], "big") & (0x7FFF if wide else 0x7F)
            for a in range(at, at + number * width, width)
        ]
        if item == wanted:
            return [entry for entry in entries if entry]
        at += number * width
    raise ValueError("the primary item has no properties")


def _has_alpha(properties: list[tuple[bytes, memoryview]]) -> bool:
    return any(name == b"auxC" and b"alpha" in bytes(content) for name, content in properties)


def read_jp2(data: memoryview) -> Header:
    """Read the header of a JPEG 2000 file, or of a bare codestream.

    Source: ITU-T T.800, annex A.5.1 (the size marker) and I.5.3.
    """
    if bytes(data[:2]) == b"\xff\x4f":
        return _jp2_header(data, b"")
    profile, palette = b"", False
    for name, content in _boxes(_box(data, b"jp2h")):
        if name == b"colr" and content[0] in (2, 3):
            profile = bytes(content[3:])
        palette = palette or name == b"pclr"
    header = _jp2_header(_box(data, b"jp2c"), profile)
    return header._replace(color="palette") if palette else header


def _jp2_header(codestream: memoryview, profile: bytes) -> Header:
    right, bottom, left, top = struct.unpack_from(">4I", codestream, 8)
    (channels,) = struct.unpack_from(">H", codestream, 40)
    bits = (codestream[42] & 0x7F) + 1
    color = {1: "grey", 2: "grey alpha", 3: "rgb", 4: "rgb alpha"}.get(channels, "channels")
    return Header("jpeg 2000", right - left, bottom - top, color, max(bits, 8), profile=profile)


def read_jxl(data: memoryview) -> Header:
    """Read the header of a JPEG XL file. Source: ISO 18181-1, annex D (image header)."""
    if bytes(data[:2]) != b"\xff\x0a":
        data = _jxl_codestream(data)
    bits = _Bits(data[2:66])
    height, width = _jxl_size(bits)
    if bits.take(1):  # all fields at their defaults
        return Header("jpeg xl", width, height, "rgb")
    orientation = 1
    if bits.take(1):  # extra fields
        orientation = 1 + bits.take(3)
        if bits.take(1):
            _jxl_size(bits)  # the intrinsic size, for display
        if bits.take(2):  # a preview or an animation; their fields come before the bit depth
            return Header("jpeg xl", width, height, "rgb", orientation=orientation)
    is_float = bool(bits.take(1))
    depth = bits.choice((32, 16, 24), 6) if is_float else bits.choice((8, 10, 12), 6)
    return Header("jpeg xl", width, height, "rgb", max(depth, 8), orientation, is_float=is_float)


def _jxl_codestream(data: memoryview) -> memoryview:
    for name, content in _boxes(data):
        if name == b"jxlc":
            return content
        if name == b"jxlp":
            return content[4:]
    raise ValueError("no codestream")


def _jxl_size(bits: "_Bits") -> tuple[int, int]:
    """Return height and width."""
    small = bits.take(1)

    def side() -> int:
        if small:
            return 8 * (1 + bits.take(5))
        return 1 + bits.take((9, 13, 18, 30)[bits.take(2)])

    height = side()
    ratio = bits.take(3)
    if ratio == 0:
        return height, side()
    numerator, denominator = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height, height * numerator // denominator


class _Bits:
    """A reader of bits, from the lowest bit of each byte upwards."""

    def __init__(self, data: memoryview) -> None:
        self._value = int.from_bytes(data, "little")
        self._num_left = 8 * len(data)

    def take(self, count: int) -> int:
        self._num_left -= count
        if self._num_left < 0:
            raise ValueError("cut off")
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        return value

    def choice(self, fixed: tuple[int, int, int], width: int) -> int:
        """Read a 2-bit selector: one of three fixed values, or ``width`` bits plus 1."""
        selector = self.take(2)
        return fixed[selector] if selector < 3 else 1 + self.take(width)
