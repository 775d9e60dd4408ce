"""Inspect a source: sizes, formats, bad images, duplicates, and the time of an epoch."""

import hashlib
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.data.color import profile_name
from raysl.data.decode import Flaw, decode_or_flaw
from raysl.data.first_look import measure_range
from raysl.data.header import read_header
from raysl.data.header_fields import Header
from raysl.data.value_ranges import ValueRange, range_advice
from raysl.pack.config import PackConfig
from raysl.pack.image import pack_image
from raysl.pack.threads import map_in_threads
from raysl.sources.pixels import Decoding
from raysl.sources.source import Encoded, Labels, Source, Unreadable

Indices = npt.NDArray[np.int64]

ADVISED_SHORT_SIDE_PX = 256  # for crops of 224 px, the usual size of a view

_CHUNK = 32  # images read together
_MAX_GROUPS = 64  # groups of the source that a sample is drawn from
_TIMED_IMAGES, _TIMED_ROUNDS = 24, 3
_FEW_IMAGES = 1_000
_MANY_FILES = 100_000
_SMALL_PX = 64
_ADVISED_SPEEDUP = 1.5
# Metadata that tells the rotation of an image; EXIF in other formats.
_ROTATED_BY = {"avif": "irot or imir", "heic": "irot or imir", "jpeg xl": "JPEG XL"}


class ImageFacts(NamedTuple):
    """The facts about one image."""

    row: int
    size_bytes: int
    header: Header
    width: int
    """Width of the upright image in pixels; 0 for a bad image."""
    height: int
    """Height of the upright image in pixels; 0 for a bad image."""
    flaw: str
    """Reason why the image is bad; empty for a good image."""
    digest: bytes
    """Digest of the encoded bytes or the pixels."""
    decode_s: float
    profile: str = ""
    """Name of the colour profile, "broken" if it cannot be read; empty without a profile."""
    values: ValueRange | None = None
    """Range of an image of more than 8 bits; None for other images, and if a setting defines black
    and white."""


class Sample(NamedTuple):
    """The rows to inspect."""

    chunks: list[Indices]
    """Rows that are read together."""
    text: str
    """Describes how the rows were drawn; empty if the sample is the whole source."""


def draw_sample(source: Source, *, count: int | None, seed: int) -> Sample:
    """Draw rows of a source evenly, without replacement.

    If the source is read in groups, the rows are from at most 64 groups, so that a large source is
    not read as a whole.

    Args:
        source: The images.
        count: Number of images to draw; None takes all.
        seed: Seed of the draw.
    """
    sizes = source.group_sizes
    total = int(sizes.sum())
    starts = np.cumsum(sizes) - sizes
    if count is None or count >= total:
        groups = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]
        return Sample(_cut(groups), "")
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)))
    if source.window_size is None:
        rows = np.sort(rng.choice(total, count, replace=False))
        return Sample(_cut([rows]), f"{count:,} of {total:,} images drawn evenly at random")
    drawn = np.sort(rng.permutation(len(sizes))[:_MAX_GROUPS])
    share = min(1.0, count / int(sizes[drawn].sum()))
    groups = [
        starts[g] + np.sort(rng.choice(sizes[g], max(1, round(share * sizes[g])), replace=False))
        for g in drawn
    ]
    text = (
        f"{sum(map(len, groups)):,} of {total:,} images drawn evenly at random from "
        f"{len(drawn):,} of {len(sizes):,} groups"
    )
    return Sample(_cut(groups), text)


def _cut(groups: Sequence[Indices]) -> list[Indices]:
    """Cut groups of rows into chunks that are read together."""
    return [g[start : start + _CHUNK] for g in groups for start in range(0, len(g), _CHUNK)]


def inspect(
    source: Source,
    sample: Sample,
    *,
    max_megapixels: float,
    num_threads: int,
    advance: Callable[[int], None],
) -> list[ImageFacts]:
    """Read and decode the rows of a sample, and return the facts about each image.

    Args:
        source: The images.
        sample: The rows to read.
        max_megapixels: Limit above which an image is bad.
        num_threads: Number of threads that decode.
        advance: Called with the number of images that were inspected since the last call.
    """

    def inspect_rows(rows: Indices) -> list[ImageFacts]:
        return [
            _inspect_image(row, data, source.decoding(row), max_megapixels * 1e6)
            for row, data in zip(rows.tolist(), source.read(rows), strict=True)
        ]

    facts: list[ImageFacts] = []
    for part in map_in_threads(inspect_rows, sample.chunks, num_threads=num_threads):
        facts += part
        advance(len(part))
    return facts


def _inspect_image(row: int, encoded: Encoded, decoding: Decoding, max_pixels: float) -> ImageFacts:
    if isinstance(encoded, Unreadable):
        return ImageFacts(row, 0, Header("unknown"), 0, 0, encoded.reason, b"", 0.0)
    if isinstance(encoded, np.ndarray):
        height, width = encoded.shape[:2]
        header = Header("pixels", width, height, "grey" if encoded.ndim == 2 else "rgb")
        size = encoded.nbytes
    else:
        header, size = read_header(encoded), len(encoded)
    profile = profile_name(header.profile) if header.profile else ""
    header = header._replace(profile=b"")  # frees its memory
    digest = hashlib.blake2b(np.ascontiguousarray(encoded).data if size else b"", digest_size=8)
    began = time.perf_counter()
    image = decode_or_flaw(encoded, decoding, max_pixels=max_pixels)
    seconds = time.perf_counter() - began
    values = (
        measure_range(encoded, decoding, max_pixels=max_pixels)
        if decoding.intensity is None
        else None
    )
    height, width, reason = 0, 0, ""
    if isinstance(image, Flaw):
        reason = "more pixels than max_megapixels" if image == Flaw.TOO_LARGE else image.reason
    else:
        height, width = image.shape[:2]
    return ImageFacts(
        row, size, header, width, height, reason, digest.digest(), seconds, profile, values
    )


def summarise(source: Source, facts: Sequence[ImageFacts], *, cores: int) -> dict[str, Any]:
    """Return statistics of a source from the facts about a sample, as plain values.

    Args:
        source: The images.
        facts: The facts about some or all of its images.
        cores: Number of cores that would decode an epoch.
    """
    good = [fact for fact in facts if not fact.flaw]
    total = int(source.group_sizes.sum())
    seconds = sum(fact.decode_s for fact in good)
    speed = cores * len(good) / seconds if seconds and good[0].header.format != "pixels" else None
    short = [min(f.width, f.height) for f in good]
    copies = _copies(facts)
    return {
        "images": total,
        "inspected": len(facts),
        "groups": len(source.group_sizes) if source.window_size is not None else None,
        "classes": _classes(source.labels(), source.class_names),
        "encoded_bytes": _spread([fact.size_bytes for fact in facts]),
        "total_bytes": round(total * float(np.mean([fact.size_bytes for fact in facts]))),
        "formats": dict(Counter(fact.header.format for fact in facts).most_common()),
        "traits": _traits(facts),
        "width": _spread([f.width for f in good]),
        "height": _spread([f.height for f in good]),
        "short_side": _spread(short),
        "aspect": _spread([f.width / f.height for f in good]),
        "value_range_advice": range_advice([f.values for f in facts if f.values is not None]),
        "broken": [{"name": source.where(f.row), "reason": f.flaw} for f in facts if f.flaw],
        "duplicates": sum(len(rows) - 1 for rows in copies),
        "duplicate_names": [[source.where(row) for row in rows] for rows in copies],
        "decoded_images_per_s": speed,
        "epoch_s": total / speed if speed else None,
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return smallest, median and largest value; None without values."""
    if not values:
        return None
    return {
        "min": min(values),
        "median": float(np.median(values)),
        "max": max(values),
    }


def _classes(labels: Labels | None, names: Sequence[str]) -> dict[str, Any] | None:
    """Return the sizes of all classes, largest first, and the number of unlabelled images.

    None if the source has no labels.
    """
    if labels is None:
        return None
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    order = np.argsort(-counts, kind="stable").tolist()
    sizes = {str(names[n]) if n < len(names) else str(n): int(counts[n]) for n in order}
    return {"count": len(sizes), "unlabelled": int((labels < 0).sum()), "sizes": sizes}


def _traits(facts: Sequence[ImageFacts]) -> dict[str, int]:
    """Count the images with each property that image pipelines often handle wrongly."""
    headers = [fact.header for fact in facts]
    traits = {
        "grey": sum(h.color.startswith("grey") for h in headers),
        "palette": sum(h.color.startswith("palette") for h in headers),
        "CMYK": sum(h.color == "cmyk" for h in headers),
        "alpha": sum(h.color.endswith("alpha") for h in headers),
        "more than 8 bits": sum(h.bits > 8 for h in headers),
        "floating point": sum(h.is_float for h in headers),
        "several pages": sum(h.pages > 1 for h in headers),
        "channels that are not colours": sum(h.color == "channels" for h in headers),
        **_turned(headers),
        "progressive": sum(h.progressive for h in headers),
    }
    profiles = Counter(f"profile {fact.profile}" for fact in facts if fact.profile)
    traits |= profiles.most_common()
    return {name: count for name, count in traits.items() if count}


def _turned(headers: Sequence[Header]) -> dict[str, int]:
    """Count the images that are stored rotated, by the kind of metadata that tells the rotation."""
    counts = Counter(_ROTATED_BY.get(h.format, "EXIF") for h in headers if h.orientation > 1)
    return {f"turned by {what}": count for what, count in counts.items()}


def _copies(facts: Sequence[ImageFacts]) -> list[list[int]]:
    """Return groups of rows with the same content, the largest group first.

    Bad images do not count as copies of each other: many are empty files or web pages.
    """
    rows: dict[bytes, list[int]] = defaultdict(list)
    for fact in facts:
        if not fact.flaw:
            rows[fact.digest].append(fact.row)
    return sorted((r for r in rows.values() if len(r) > 1), key=lambda r: (-len(r), r))


def pack_speedup(source: Source, facts: Sequence[ImageFacts]) -> float | None:
    """Measure how much faster images decode once `raysl pack` has shrunk them to 256 px.

    Returns:
        Time before over time after, for a few images of the sample; None if most images are small
        already.
    """
    good = [f for f in facts if not f.flaw and f.header.format != "pixels"]
    if not good or np.median([min(f.width, f.height) for f in good]) <= ADVISED_SHORT_SIDE_PX:
        return None
    decoding = source.decoding(good[0].row)._asdict()
    config = PackConfig(source=source.name, short_side_px=ADVISED_SHORT_SIDE_PX, **decoding)
    spread = np.unique(np.linspace(0, len(good) - 1, _TIMED_IMAGES).astype(int))
    rows = [good[index].row for index in spread]
    originals = source.read(rows)
    packed = [pack_image(encoded, config).image for encoded in originals]
    decodings = [source.decoding(row) for row in rows]
    return _decode_seconds(originals, decodings) / _decode_seconds(packed, decodings)


def _decode_seconds(images: Sequence[Encoded], decodings: Sequence[Decoding]) -> float:
    """Return the shortest time of a few rounds, since other processes use the machine too."""
    seconds = []
    for _ in range(_TIMED_ROUNDS):
        began = time.perf_counter()
        for image, decoding in zip(images, decodings, strict=True):
            decode_or_flaw(image, decoding)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def advise(
    source: Source, summary: dict[str, Any], *, speedup: float | None, words: Sequence[str]
) -> list[str]:
    """Return advice on a source, in whole sentences.

    Args:
        source: The images.
        summary: Result of :func:`summarise`.
        speedup: Result of :func:`pack_speedup`.
        words: Source and settings as on the command line, for the commands that the advice shows.
    """
    pack_command = shlex.join(["raysl", "pack", words[0], "packed", *words[1:]])
    advice = []
    total, inspected = summary["images"], summary["inspected"]
    bad = len(summary["broken"])
    if bad:
        advice.append(
            f"{bad / inspected:.1%} of the images are bad: `raysl pack` leaves them out; training "
            f"follows data.bad_images.policy."
        )
        (reason, number), *_ = Counter(image["reason"] for image in summary["broken"]).most_common(
            1
        )
        if number > 1:
            advice.append(f"{number:,} of the bad images: {reason}.")
    advice += summary["value_range_advice"]
    if speedup is not None and speedup >= _ADVISED_SPEEDUP:
        side = summary["short_side"]["median"]
        advice.append(
            f"The median short side is {side:,.0f} px: `{pack_command} "
            f"short_side_px={ADVISED_SHORT_SIDE_PX}` makes decoding {speedup:.1f} times faster; "
            f"the images stay large enough for views of 224 px."
        )
    elif source.window_size is None and total > _MANY_FILES and "pixels" not in summary["formats"]:
        advice.append(
            f"{total:,} single files are slow to list and slow to read over a network: "
            f"`{pack_command}` stores the images in a few large files."
        )
    if total < _FEW_IMAGES:
        advice.append(
            f"{total:,} images are few: pretraining learns little from them alone; start from an "
            f"encoder trained on more, or add unlabelled images with data.mix."
        )
    if summary["short_side"] and summary["short_side"]["median"] <= _SMALL_PX:
        advice.append(
            f"The images are small ({summary['short_side']['median']:,.0f} px): use views of their "
            f"size and a backbone made for it, as configs/simclr_resnet18_cifar10.yaml does."
        )
    if summary["duplicates"] > inspected / 100:
        advice.append(
            f"{summary['duplicates']:,} images are copies of others: remove them. Otherwise "
            f"training sees them more often, and test images may be among the training images."
        )
    if summary["classes"] is None:
        advice.append(
            f"There are no labels: pretraining needs none, but accuracy cannot be measured on "
            f"these images; to measure it, {source.label_advice}."
        )
    return advice
