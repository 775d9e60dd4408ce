"""Inspect a few images before a run for problems that would otherwise go unnoticed."""

import importlib.util
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysl.data.decode import Flaw, decode_or_flaw, value_range
from raysl.data.header import read_header
from raysl.data.value_ranges import ValueRange, range_advice
from raysl.sources.pixels import Decoding
from raysl.sources.source import Encoded, Source, Unreadable, spread_rows

_GROUPS = 2  # of a source that is read in groups
# Formats that can be read if their header is complete and has no unusual fields.
_TRUSTED = ("jpeg", "png", "webp", "bmp", "gif", "avif", "jpeg 2000", "netpbm", "tiff")
_LIBRARIES = {
    "heic": ("pillow_heif", Flaw.NEEDS_HEIF),
    "jpeg xl": ("pillow_jxl", Flaw.NEEDS_JXL),
}


def first_look(source: Source, *, count: int = 32) -> list[str]:
    """Inspect the headers of a few images, evenly spaced over a source.

    If the source is read in groups, only two groups are read. An image is decoded only if it has
    more than 8 bits or several pages, or if its header does not show that it can be read.

    Args:
        source: The source to inspect.
        count: Number of images to inspect.

    Returns:
        A sentence for each problem that needs a setting, a package or another folder; usually none.
    """
    rows = _rows(source, count)
    ranges: list[ValueRange] = []
    flaws: Counter[str] = Counter()
    for row, encoded in zip(rows.tolist(), source.read(rows), strict=True):
        decoding = source.decoding(row)
        flaw = _flaw(encoded, decoding)
        if flaw is not None:
            flaws[flaw] += 1
        if decoding.intensity is None:
            limits = measure_range(encoded, decoding)
            ranges += [] if limits is None else [limits]
    return [*range_advice(ranges), *_flaw_notes(flaws, len(rows), name=source.name)]


def measure_range(
    encoded: Encoded, decoding: Decoding, *, max_pixels: float = 1e8
) -> ValueRange | None:
    """Return the value range of an image of more than 8 bits; None for other images."""
    limits = value_range(encoded, decoding, max_pixels=max_pixels)
    if limits is None or isinstance(encoded, Unreadable | np.ndarray):
        return None
    return ValueRange(*limits, is_float=read_header(encoded).is_float)


def _rows(source: Source, count: int) -> npt.NDArray[np.int64]:
    sizes = source.group_sizes
    if source.window_size is None:
        return spread_rows(int(sizes.sum()), count)
    starts = np.cumsum(sizes) - sizes
    groups = np.flatnonzero(sizes)
    groups = groups[spread_rows(len(groups), _GROUPS)]
    per_group = max(1, count // max(1, len(groups)))
    return np.concatenate([starts[g] + spread_rows(int(sizes[g]), per_group) for g in groups])


def _flaw(encoded: Encoded, decoding: Decoding) -> str | None:
    """Return why an image is bad; None if it is good, or if only decoding could tell."""
    if isinstance(encoded, Unreadable):
        return encoded.reason
    if isinstance(encoded, np.ndarray):
        return None
    if not len(encoded):
        return Flaw.EMPTY.reason
    header = read_header(encoded)
    if header.format in _LIBRARIES:
        library, flaw = _LIBRARIES[header.format]
        return flaw.reason if importlib.util.find_spec(library) is None else None
    sound = header.format in _TRUSTED and header.width and header.color not in ("", "channels")
    if sound and header.bits <= 8 and header.pages == 1 and not header.is_float:
        return None
    image = decode_or_flaw(encoded, decoding, max_pixels=1e8)
    return image.reason if isinstance(image, Flaw) else None


# Flaws that a setting, a package or a command removes.
_CURABLE = (
    Flaw.NEEDS_HEIF,
    Flaw.NEEDS_JXL,
    Flaw.NEEDS_TIFFFILE,
    Flaw.NEEDS_CODECS,
    Flaw.PAGES,
    Flaw.CHANNELS,
    Flaw.GIT_LFS,
)


def _flaw_notes(flaws: Counter[str], num_inspected: int, *, name: str) -> Sequence[str]:
    """Return notes on flaws that the user can fix, and on a source whose images are mostly bad."""
    curable = {flaw.reason for flaw in _CURABLE}
    lines = [
        f"{number:,} of {num_inspected:,} images looked at in {name} cannot be used: {reason}"
        for reason, number in flaws.most_common()
        if reason in curable
    ]
    others = Counter({reason: n for reason, n in flaws.items() if reason not in curable})
    if 2 * flaws.total() > num_inspected and others:
        reasons = ", ".join(f"{reason} ({number:,})" for reason, number in others.most_common(3))
        lines.append(
            f"{flaws.total():,} of {num_inspected:,} images looked at in {name} are bad: "
            f"{reasons}; look at the source with `raysl data`"
        )
    return lines
