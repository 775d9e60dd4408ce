"""Read the values of one TIFF page, or of several pages as channels."""

import importlib
import io
import struct
from typing import Any

import numpy as np

from raysl.data.flaw import Flaw
from raysl.data.header_fields import Header
from raysl.data.header_tiff import (
    ASSOCIATED,
    FLOAT,
    SIGNED,
    UNSIGNED,
    Page,
    as_first,
    read_pages,
)
from raysl.data.readers import stored_values, with_pillow
from raysl.data.samples import Samples, Values
from raysl.sources.pixels import Pages

_KINDS = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}
_WHITE_IS_ZERO = 0
_MOST_CHANNELS = 3
_PACKED_BITS = (10, 12, 14)
_COLORS = ("grey", "rgb", "cmyk")

Encoded = bytes | memoryview


def read_tiff(encoded: Encoded, header: Header, pages: Pages) -> Samples | Flaw:
    """Return the values of the page or pages that the setting ``data.pages`` selects."""
    try:
        found_pages, _ = read_pages(memoryview(encoded))
    except (struct.error, ValueError, IndexError):
        return Flaw.DAMAGED
    first = found_pages[0]
    if pages == "refuse":
        if header.pages > 1:
            return Flaw.PAGES
        if first.color == "channels":
            return Flaw.CHANNELS
    if first.color == "channels":
        return _channels_of_page(encoded, first, 1 if pages == "first" else _MOST_CHANNELS)
    if pages == "channels" and len(found_pages) > 1 and first.color == "grey":
        return _pages_as_channels(encoded, found_pages[:_MOST_CHANNELS])
    return _one_page(encoded, first)


def _pages_as_channels(encoded: Encoded, pages: list[Page]) -> Samples | Flaw:
    read = []
    for page in pages:
        samples = _one_page(encoded, page)
        if isinstance(samples, Flaw):
            return samples
        read.append(samples)
    if len({(samples.values.shape, samples.values.dtype) for samples in read}) > 1:
        return Flaw.PAGES  # the pages are not channels of one image
    values = _as_colors([samples.values for samples in read])
    return read[0]._replace(values=values, color="channels", profile=b"")


def _channels_of_page(encoded: Encoded, page: Page, count: int) -> Samples | Flaw:
    values = _with_tifffile(encoded, page)
    if isinstance(values, Flaw):
        return values
    if values.ndim == 2 or count == 1:
        values = values if values.ndim == 2 else np.ascontiguousarray(values[..., 0])
        return _finished(values, page._replace(color="grey"))
    channels = _as_colors([values[..., n] for n in range(min(count, values.shape[2]))])
    return Samples(channels, "channels", _declared(page), page.orientation)


def _as_colors(channels: list[Values]) -> Values:
    """Return channels as red, green and blue; of two channels, blue is zero."""
    black = np.zeros_like(channels[0])
    return np.dstack([*channels, *[black] * (_MOST_CHANNELS - len(channels))])


def _one_page(encoded: Encoded, page: Page) -> Samples | Flaw:
    """Decode a page with the first library that keeps its values as stored."""
    first = as_first(encoded, page)
    if page.color == "channels":
        return Flaw.CHANNELS
    if not _is_deep(page):
        read = with_pillow(first, _header(page))
        if read is not None:
            return _with_declared_range(read, page)
        # Only OpenCV reads some pages, such as those with JPEG 2000 inside.
        values = stored_values(first) if page.color in ("grey", "rgb") and not page.alpha else None
        if values is not None and values.dtype == np.uint8:
            return _finished(values, page)
        return _refused_by_both(encoded, page)
    values = None if page.planar or page.color not in ("grey", "rgb") else _deep(first, page)
    if values is None:
        return _refused_by_both(encoded, page)
    return _finished(values, page)


def _refused_by_both(encoded: Encoded, page: Page) -> Samples | Flaw:
    if page.color not in _COLORS:
        return Flaw.TIFF_KIND
    values = _with_tifffile(encoded, page)
    return values if isinstance(values, Flaw) else _finished(values, page)


def _is_deep(page: Page) -> bool:
    return page.bits > 8 or page.kind != UNSIGNED


def _header(page: Page) -> Header:
    return Header("tiff", orientation=page.orientation, profile=page.profile)


def _deep(encoded: Encoded, page: Page) -> Values | None:
    """Decode more than 8 bits with OpenCV, and check the result: it misreads some kinds."""
    values = stored_values(encoded)
    channels = 1 if values is None or values.ndim == 2 else values.shape[2]
    if values is None or channels != page.samples:
        return None
    if page.bits in _PACKED_BITS and values.dtype == np.uint16:
        return values >> (16 - page.bits)  # type: ignore[no-any-return]
    expected = f"{_KINDS.get(page.kind, '?')}{page.bits // 8}"
    return values if values.dtype.str[1:] == expected else None


def _with_tifffile(encoded: Encoded, page: Page) -> Values | Flaw:
    """Decode a page of any kind with tifffile: ``(H, W)`` or ``(H, W, C)``."""
    try:
        library = importlib.import_module("tifffile")  # optional dependency, imported lazily
    except ImportError:
        return Flaw.NEEDS_TIFFFILE
    try:
        with library.TiffFile(io.BytesIO(as_first(encoded, page))) as file:
            values: Any = file.pages.first.asarray()
    except Exception as error:  # damaged files raise undocumented exceptions
        return Flaw.NEEDS_CODECS if "imagecodecs" in str(error) else Flaw.DAMAGED
    values = np.moveaxis(values, 0, -1) if page.planar and values.ndim == 3 else values
    expected = (page.height, page.width)
    if values.shape not in (expected, (*expected, page.samples)):
        return Flaw.TIFF_KIND  # a volume, or other axes
    return np.ascontiguousarray(values)


def _finished(values: Values, page: Page) -> Samples:
    """Return stored values without alpha, with black at zero."""
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    if page.alpha == ASSOCIATED:
        values = _divided(values)
    count = {"rgb": 3, "cmyk": 4}.get(page.color, 1)
    if values.ndim == 3:
        values = np.ascontiguousarray(values[..., :count]) if count > 1 else values[..., 0].copy()
    declared = _declared(page)
    if page.photometric == _WHITE_IS_ZERO:
        values = _inverted(values, page, declared)
    color: Any = page.color
    if color == "cmyk" and values.dtype != np.uint8:
        values, declared = _upper_byte(values), None
    return Samples(values, color, declared, page.orientation, page.profile)


def _declared(page: Page) -> tuple[float, float] | None:
    """Return the value range of a bit depth that no NumPy type has, such as 12."""
    if page.kind == UNSIGNED and page.bits not in (8, 16, 32, 64) and page.bits > 1:
        return 0.0, 2.0**page.bits - 1
    return None


def _with_declared_range(read: Samples, page: Page) -> Samples:
    """Set the page's value range: Pillow widens fewer than 8 bits to 8 without scaling them."""
    return read if page.bits <= 8 else read._replace(full=_declared(page))


def _divided(values: Values) -> Values:
    """Undo the premultiplication of colours by alpha, the last channel."""
    alpha = values[..., -1:].astype(np.float64)
    white = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    result = values.astype(np.float64)
    np.divide(result * white, alpha, out=result, where=alpha > 0)
    if values.dtype.kind == "f":
        return result.astype(values.dtype)
    return np.clip(np.rint(result), 0, white).astype(values.dtype)


def _inverted(values: Values, page: Page, declared: tuple[float, float] | None) -> Values:
    if values.dtype.kind == "f":
        return 1 - values
    if declared is not None:
        return (int(declared[1]) - values).astype(values.dtype)
    return ~values


def _upper_byte(values: Values) -> Values:
    """Reduce CMYK to 8 bits; ``data.intensity`` does not apply to it."""
    if values.dtype.kind == "f":
        values = np.clip(np.rint(values * 255), 0, 255)
        return values.astype(np.uint8)
    return (values >> (np.iinfo(values.dtype).bits - 8)).astype(np.uint8)
