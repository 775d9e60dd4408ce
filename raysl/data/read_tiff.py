"""Read the values of one TIFF page, or of several pages as channels of one image."""

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
    """Read the page or pages that the setting ``data.pages`` selects."""
    try:
        file_pages, _ = read_pages(memoryview(encoded))
    except (struct.error, ValueError, IndexError):
        return Flaw.DAMAGED
    first = file_pages[0]
    if pages == "refuse":
        if header.pages > 1:
            return Flaw.PAGES
        if first.color == "channels":
            return Flaw.CHANNELS
    if first.color == "channels":
        return _channels_of_page(encoded, first, 1 if pages == "first" else _MOST_CHANNELS)
    if pages == "channels" and len(file_pages) > 1 and first.color == "grey":
        return _pages_as_channels(encoded, file_pages[:_MOST_CHANNELS])
    return _one_page(encoded, first)


def _pages_as_channels(encoded: Encoded, pages: list[Page]) -> Samples | Flaw:
    page_samples = []
    for page in pages:
        samples = _one_page(encoded, page)
        if isinstance(samples, Flaw):
            return samples
        page_samples.append(samples)
    if len({(samples.values.shape, samples.values.dtype) for samples in page_samples}) > 1:
        return Flaw.PAGES  # the pages are not channels of one image
    values = _as_colors([samples.values for samples in page_samples])
    return page_samples[0]._replace(values=values, color="channels", profile=b"")


def _channels_of_page(encoded: Encoded, page: Page, count: int) -> Samples | Flaw:
    values = _with_tifffile(encoded, page)
    if isinstance(values, Flaw):
        return values
    if values.ndim == 2 or count == 1:
        values = values if values.ndim == 2 else np.ascontiguousarray(values[..., 0])
        return _to_samples(values, page._replace(color="grey"))
    channels = _as_colors([values[..., n] for n in range(min(count, values.shape[2]))])
    return Samples(channels, "channels", _declared_range(page), page.orientation)


def _as_colors(channels: list[Values]) -> Values:
    """Stack up to three channels as red, green and blue; missing ones are zero."""
    black = np.zeros_like(channels[0])
    return np.dstack([*channels, *[black] * (_MOST_CHANNELS - len(channels))])


def _one_page(encoded: Encoded, page: Page) -> Samples | Flaw:
    """Decode a page with the first library that returns its values as stored."""
    file = as_first(encoded, page)
    if page.color == "channels":
        return Flaw.CHANNELS
    if not _is_deep(page):
        samples = with_pillow(file, _header(page))
        if samples is not None:
            return _with_declared_range(samples, page)
        # Some pages only OpenCV reads, such as those that contain JPEG 2000.
        values = stored_values(file) if page.color in ("grey", "rgb") and not page.alpha else None
        if values is not None and values.dtype == np.uint8:
            return _to_samples(values, page)
        return _refused_by_both(encoded, page)
    values = None if page.planar or page.color not in ("grey", "rgb") else _read_deep(file, page)
    if values is None:
        return _refused_by_both(encoded, page)
    return _to_samples(values, page)


def _refused_by_both(encoded: Encoded, page: Page) -> Samples | Flaw:
    if page.color not in _COLORS:
        return Flaw.TIFF_KIND
    values = _with_tifffile(encoded, page)
    return values if isinstance(values, Flaw) else _to_samples(values, page)


def _is_deep(page: Page) -> bool:
    return page.bits > 8 or page.kind != UNSIGNED


def _header(page: Page) -> Header:
    return Header("tiff", orientation=page.orientation, profile=page.profile)


def _read_deep(encoded: Encoded, page: Page) -> Values | None:
    """Decode more than 8 bits with OpenCV; None if it fails or misreads the page."""
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


def _to_samples(values: Values, page: Page) -> Samples:
    """Remove the alpha channel and make black zero."""
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    if page.alpha == ASSOCIATED:
        values = _divide_by_alpha(values)
    count = {"rgb": 3, "cmyk": 4}.get(page.color, 1)
    if values.ndim == 3:
        values = np.ascontiguousarray(values[..., :count]) if count > 1 else values[..., 0].copy()
    declared = _declared_range(page)
    if page.photometric == _WHITE_IS_ZERO:
        values = _invert(values, page, declared)
    color: Any = page.color
    if color == "cmyk" and values.dtype != np.uint8:
        values, declared = _upper_byte(values), None
    return Samples(values, color, declared, page.orientation, page.profile)


def _declared_range(page: Page) -> tuple[float, float] | None:
    """Return the value range of a bit depth without a NumPy type, such as 12; None for others."""
    if page.kind == UNSIGNED and page.bits not in (8, 16, 32, 64) and page.bits > 1:
        return 0.0, 2.0**page.bits - 1
    return None


def _with_declared_range(samples: Samples, page: Page) -> Samples:
    """Set the page's value range: Pillow stores fewer than 8 bits as 8 without scaling them."""
    return samples if page.bits <= 8 else samples._replace(full=_declared_range(page))


def _divide_by_alpha(values: Values) -> Values:
    """Divide colours that were multiplied by alpha, the last channel, by it."""
    alpha = values[..., -1:].astype(np.float64)
    white = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    result = values.astype(np.float64)
    np.divide(result * white, alpha, out=result, where=alpha > 0)
    if values.dtype.kind == "f":
        return result.astype(values.dtype)
    return np.clip(np.rint(result), 0, white).astype(values.dtype)


def _invert(values: Values, page: Page, declared: tuple[float, float] | None) -> Values:
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
