"""Read the directories of a TIFF file: its pages and their layout."""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from raysl.data.header_fields import Header

SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS = 254, 255, 256, 257, 258
COMPRESSION, PHOTOMETRIC, DESCRIPTION, ORIENTATION, SAMPLES = 259, 262, 270, 274, 277
PLANAR, SUB_DIRECTORIES, EXTRA, SAMPLE_FORMAT = 284, 330, 338, 339
PROFILE, DNG_VERSION = 34675, 50706
_READ_TAGS = frozenset(
    {
        *(SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION),
        *(ORIENTATION, SAMPLES, PLANAR, SUB_DIRECTORIES, EXTRA, SAMPLE_FORMAT, PROFILE),
        DNG_VERSION,
    }
)

# Sizes and codes of the value types: TIFF 6.0 sec. 2, and 16 to 18 of BigTIFF.
_TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 6: "b", 7: "c", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}
_MOST_VALUES = 64
_MOST_BYTES = 8 << 20
MOST_PAGES = 1000
_REDUCED, _MASK = 1, 4
_SENSOR, _LINEAR_SENSOR = 32803, 34892
_COLORS = {0: "grey", 1: "grey", 2: "rgb", 3: "palette", 5: "cmyk", 6: "rgb", 8: "lab"}
_SAMPLES_OF_COLOR = {"grey": 1, "rgb": 3, "palette": 1, "cmyk": 4, "lab": 3}
ASSOCIATED, UNASSOCIATED = 1, 2
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
_IMAGEJ_IMAGES = re.compile(rb"^ImageJ=.*?^images=(\d+)", re.MULTILINE | re.DOTALL)

Tags = dict[int, tuple[int, ...] | bytes]


class Page(NamedTuple):
    """One page of a TIFF file."""

    offset: int
    """Offset of the page's directory, in bytes."""
    width: int
    height: int
    color: str
    """grey, rgb, palette, cmyk, lab, or channels for samples that are not colours."""
    bits: int
    kind: int
    """``UNSIGNED``, ``SIGNED`` or ``FLOAT``."""
    samples: int
    alpha: int
    """``ASSOCIATED``, ``UNASSOCIATED``, or 0 without alpha."""
    photometric: int
    planar: bool
    """Whether the samples are stored plane after plane."""
    orientation: int
    profile: bytes


def tiff_header(data: memoryview) -> Header:
    """Read the header of a TIFF from its first page."""
    pages, raw = read_pages(data)
    if raw:
        return Header("camera raw")
    first = pages[0]
    color = first.color + (" alpha" if first.alpha and first.color != "channels" else "")
    bits = max(first.bits, 8)
    return Header(
        "tiff",
        first.width,
        first.height,
        color,
        bits,
        first.orientation,
        is_float=first.kind == FLOAT,
        pages=max(len(pages), _images_of_imagej(data)),
        profile=first.profile,
    )


def read_pages(data: memoryview) -> tuple[list[Page], bool]:
    """Return the pages, without smaller copies and masks, and whether the file is camera raw.

    Raises:
        ValueError, struct.error, IndexError: If there is no page, or its directory is damaged.
    """
    pages: list[Page] = []
    small: list[Page] = []
    raw = bytes(data[8:10]) == b"CR"  # Canon's raw format
    for offset, tags in _directories(data):
        raw = raw or _is_raw(data, tags)
        (small if _is_small(tags) else pages).append(_page(offset, tags))
    if not (pages or small):
        raise ValueError("no directory")
    return pages or small[:1], raw


def as_first(encoded: bytes | memoryview, page: Page) -> bytes | memoryview:
    """Return the file with this page as the first, for libraries that read only the first page."""
    order = _order(memoryview(encoded))
    code, at = (order + "Q", 8) if _is_big(memoryview(encoded)) else (order + "I", 4)
    if struct.unpack_from(code, encoded, at)[0] == page.offset:
        return encoded
    changed = bytearray(encoded)
    struct.pack_into(code, changed, at, page.offset)
    return bytes(changed)


def _order(data: memoryview) -> str:
    return "<" if bytes(data[:2]) == b"II" else ">"


def _is_big(data: memoryview) -> bool:
    return 43 in (data[2], data[3])


def _directories(data: memoryview) -> Iterator[tuple[int, Tags]]:
    """Yield offset and tags of each directory, up to a damaged one; raise if that is the first."""
    order, big = _order(data), _is_big(data)
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    seen: set[int] = set()
    while at and at not in seen and len(seen) < MOST_PAGES:
        seen.add(at)
        try:
            tags, following = _directory(data, at, order, big=big)
        except struct.error:
            if len(seen) == 1:
                raise
            return
        yield at, tags
        at = following


def _directory(data: memoryview, at: int, order: str, *, big: bool) -> tuple[Tags, int]:
    """Return the relevant tags of a directory, and the offset of the next one."""
    count_code, entry_code, size, inline = ("Q", "HHQ", 20, 8) if big else ("H", "HHI", 12, 4)
    (count,) = struct.unpack_from(order + count_code, data, at)
    begin = at + struct.calcsize(count_code)
    tags: Tags = {}
    for entry in range(begin, begin + size * min(count, 4096), size):
        tag, kind, number = struct.unpack_from(order + entry_code, data, entry)
        if tag in _READ_TAGS and kind in _TYPES:
            tags[tag] = _values(data, entry + size - inline, order, _TYPES[kind], number, inline)
    offset = order + ("Q" if big else "I")
    try:
        return tags, int(struct.unpack_from(offset, data, begin + size * count)[0])
    except struct.error:  # truncated after the last entry: the page itself may be intact
        return tags, 0


def _values(
    data: memoryview, place: int, order: str, code: str, number: int, inline: int
) -> tuple[int, ...] | bytes:
    number = min(number, _MOST_BYTES if code == "c" else _MOST_VALUES)
    if number * struct.calcsize(code) > inline:  # the entry holds an offset instead
        (place,) = struct.unpack_from(order + ("Q" if inline == 8 else "I"), data, place)
    if code == "c":
        return bytes(data[place : place + number])
    return struct.unpack_from(f"{order}{number}{code}", data, place)


def _first(tags: Tags, tag: int, default: int) -> int:
    values = tags.get(tag)
    return int(values[0]) if values else default


def _is_small(tags: Tags) -> bool:
    return bool(_first(tags, SUBFILE, 0) & (_REDUCED | _MASK)) or _first(tags, OLD_SUBFILE, 1) == 2


def _is_raw(data: memoryview, tags: Tags) -> bool:
    """Return whether a directory, or one of its subdirectories, holds sensor values."""
    if DNG_VERSION in tags or _first(tags, PHOTOMETRIC, -1) in (_SENSOR, _LINEAR_SENSOR):
        return True
    for offset in tags.get(SUB_DIRECTORIES, ())[:8]:
        try:
            below, _ = _directory(data, int(offset), _order(data), big=_is_big(data))
        except struct.error:
            continue
        if _first(below, PHOTOMETRIC, -1) in (_SENSOR, _LINEAR_SENSOR):
            return True
    return False


def _page(offset: int, tags: Tags) -> Page:
    photometric, samples = _first(tags, PHOTOMETRIC, -1), _first(tags, SAMPLES, 1)
    color = _COLORS.get(photometric, "")
    extra = tags.get(EXTRA, ())
    num_extra = samples - _SAMPLES_OF_COLOR.get(color, samples)
    alpha = int(extra[0]) if len(extra) else 0
    alpha = alpha if num_extra and alpha in (ASSOCIATED, UNASSOCIATED) else 0
    # Extra samples beside colours are ignored. Beside grey, any but alpha make the page "channels".
    if color and (num_extra < 0 or (color == "grey" and num_extra > (1 if alpha else 0))):
        color = "channels"
    orientation = _first(tags, ORIENTATION, 1)
    profile = tags.get(PROFILE, b"")
    return Page(
        offset,
        _first(tags, WIDTH, 0),
        _first(tags, HEIGHT, 0),
        color,
        _first(tags, BITS, 1),
        _first(tags, SAMPLE_FORMAT, UNSIGNED),
        samples,
        alpha,
        photometric,
        samples > 1 and _first(tags, PLANAR, 1) == 2,
        orientation if 1 <= orientation <= 8 else 1,
        profile if isinstance(profile, bytes) else bytes(value & 255 for value in profile),
    )


def _images_of_imagej(data: memoryview) -> int:
    """Return how many images ImageJ stored behind one directory, as it does for large stacks."""
    _, tags = next(_directories(data))
    text = tags.get(DESCRIPTION, b"")
    match = _IMAGEJ_IMAGES.search(text) if isinstance(text, bytes) else None
    return int(match[1]) if match else 1
