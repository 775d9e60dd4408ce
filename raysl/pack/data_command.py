"""`raysl data`: inspect a source of images, and advise how to prepare it."""

import argparse
import os
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import Field

from raysl.augment.crop import Image
from raysl.data.decode import decode
from raysl.errors import DataError
from raysl.pack.inspect import (
    ImageFacts,
    advise,
    draw_sample,
    inspect,
    pack_speedup,
    summarise,
)
from raysl.report.measure import duration_text
from raysl.report.progress import CountView
from raysl.report.terminal import console, mapping_table, print_json, say
from raysl.sources.command_line import open_argument
from raysl.sources.source import Encoded, LocatedSource, Source

_SAMPLE = 10_000
_SHEET_IMAGES = 63
_SHEET_SIDE_PX = 480
_SHOWN_CLASSES = 5  # largest and smallest
_SHOWN_DUPLICATES = 5
_SHOWN_BAD = 10
_MIB = 1 << 20

_KINDS = {
    "FolderSource": "a folder of image files",
    "ParquetSource": "Parquet",
    "ArraySource": "pixels in memory",
    "TarSource": "tar archives",
}

_EPILOG = f"""\
If there are more than {_SAMPLE:,} images, a random sample is inspected; --sample 0 inspects all.
Each image is read and decoded, in threads. Only the contact sheet is written, if requested.

Settings: image_column=..., label_column=..., filter=[[...]], limit=..., as under `data:` of a
configuration; max_megapixels=100 (larger images are bad); seed=0 (of the sample).

  raysl data photos/ --contact-sheet sheet.png
  raysl data 's3://bucket/shards/*.tar' --sample 1000
  raysl data faces.parquet image_column=jpg --json
"""


class InspectConfig(LocatedSource):
    """The source to inspect, and the settings of its inspection."""

    max_megapixels: Annotated[float, Field(gt=0.0, le=178.0)] = 100.0
    """An image of more pixels is bad."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "source", help="a folder of images, Parquet, tar, s3://..., digits, cifar10, ..."
    )
    parser.add_argument("overrides", nargs="*", help="key=value, typed as YAML")
    parser.add_argument(
        "--sample",
        type=_number_or_all,
        default=_SAMPLE,
        metavar="N",
        help=f"number of images to inspect (default {_SAMPLE}); 0 or all inspects every image",
    )
    parser.add_argument(
        "--contact-sheet",
        type=Path,
        metavar="FILE.png",
        help=f"draw {_SHEET_IMAGES} random images with the names of their classes",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> int:
    """Inspect a source; print its properties, its problems and advice."""
    config, source = open_argument(arguments, InspectConfig, where="raysl data")
    sample = draw_sample(source, count=arguments.sample or None, seed=config.seed)
    cores = os.cpu_count() or 1
    cv2.setNumThreads(1)  # parallel over images
    view = CountView()
    view.begin("inspecting", total=sum(map(len, sample.chunks)), done=0)
    try:
        facts = inspect(
            source,
            sample,
            max_megapixels=config.max_megapixels,
            num_threads=cores,
            advance=view.advance,
        )
    finally:
        view.close()
    summary: dict[str, Any] = {"source": config.source, "kind": _kind(source)}
    summary["splits"] = list(source.splits)
    summary |= {
        "sample": sample.text or None,
        "notes": list(source.notes),
        **summarise(source, facts, cores=cores),
    }
    summary["pack_speedup"] = pack_speedup(source, facts)
    words = [config.source, *arguments.overrides]
    summary["advice"] = advise(source, summary, speedup=summary["pack_speedup"], words=words)
    _say(summary, cores=cores)
    for note in source.notes:
        say(f"note: {note}")
    if arguments.contact_sheet is not None:
        _draw(arguments.contact_sheet, source, facts, summary, seed=config.seed)
        say(f"contact sheet: {arguments.contact_sheet}")
    if arguments.json:
        print_json(summary)
    return 0


def _number_or_all(text: str) -> int:
    number = 0 if text == "all" else int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"give a number of images, 0 or all; got {text}")
    return number


def _kind(source: Source) -> str:
    name = type(source).__name__
    return _KINDS.get(name, name.removesuffix("Source").lower())


def _say(summary: dict[str, Any], *, cores: int) -> None:
    out = console()
    out.print(mapping_table(summary["source"], _rows(summary, cores=cores)))
    bad_images = summary["broken"]
    lines = [f"bad image: {bad['name']}: {bad['reason']}" for bad in bad_images[:_SHOWN_BAD]]
    more = len(bad_images) - _SHOWN_BAD
    lines += [f"bad images: {more:,} more; --json lists all"] if more > 0 else []
    lines += [
        f"duplicates: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for names in summary["duplicate_names"][:_SHOWN_DUPLICATES]
    ]
    lines += [f"-> {advice}" for advice in summary["advice"]]
    out.print("\n".join(lines), markup=False)


def _rows(summary: dict[str, Any], *, cores: int) -> dict[str, str]:
    inspected, size = summary["inspected"], summary["total_bytes"] / _MIB
    rows = {
        "kind": summary["kind"] + (f", {summary['groups']:,} groups" if summary["groups"] else ""),
        "images": f"{summary['images']:,}, {size:,.1f} MiB"
        + (" (estimated)" if summary["sample"] else ""),
        "inspected": summary["sample"] or "every image",
        **_class_rows(summary["classes"]),
        "formats": _shares(summary["formats"], inspected),
    }
    if summary["traits"]:
        rows["properties"] = _shares(summary["traits"], inspected)
    rows["bytes per image"] = _range(summary["encoded_bytes"], "{:,.0f}")
    if summary["width"]:
        rows["width"] = _range(summary["width"], "{:,.0f}") + " px"
        rows["height"] = _range(summary["height"], "{:,.0f}") + " px"
        rows["short side"] = _range(summary["short_side"], "{:,.0f}") + " px"
        rows["width / height"] = _range(summary["aspect"], "{:.2f}")
    rows["bad images"] = f"{len(summary['broken']):,}"
    rows["duplicates"] = f"{summary['duplicates']:,}"
    if summary["decoded_images_per_s"]:
        rows["decoding"] = (
            f"{summary['decoded_images_per_s']:,.0f} images/s on this machine's {cores} core(s): "
            f"{duration_text(summary['epoch_s'])} per epoch, decoding alone"
        )
    return rows


def _class_rows(classes: dict[str, Any] | None) -> dict[str, str]:
    if classes is None:
        return {"labels": "none"}
    sizes = list(classes["sizes"].items())
    rows = {"classes": f"{classes['count']:,}"}
    if classes["unlabelled"]:
        rows["unlabelled"] = f"{classes['unlabelled']:,} images"
    if len(sizes) <= 2 * _SHOWN_CLASSES:
        rows["class sizes"] = ", ".join(f"{name}: {size:,}" for name, size in sizes)
    else:
        rows["largest"] = ", ".join(f"{name}: {size:,}" for name, size in sizes[:_SHOWN_CLASSES])
        rows["smallest"] = ", ".join(f"{name}: {size:,}" for name, size in sizes[-_SHOWN_CLASSES:])
    return rows


def _shares(counts: dict[str, int], total: int) -> str:
    return ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in counts.items())


def _range(spread: dict[str, float], form: str) -> str:
    low, middle, high = (form.format(spread[name]) for name in ("min", "median", "max"))
    return low if low == high else f"{low} to {high}, median {middle}"


def _draw(
    path: Path, source: Source, facts: list[ImageFacts], summary: dict[str, Any], *, seed: int
) -> None:
    good = [fact.row for fact in facts if not fact.flaw]
    if not good:
        raise DataError(
            f"{summary['source']}: all inspected images are bad, so there is no contact sheet"
        )
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 1], dtype=np.uint64)))
    rows = np.sort(rng.choice(good, min(_SHEET_IMAGES, len(good)), replace=False))
    images = [
        _decode_small(row, data, source)
        for row, data in zip(rows.tolist(), source.read(rows), strict=True)
    ]
    order = rng.permutation(len(rows))  # read in the source's order, drawn in a random one
    labels, names = source.labels(), source.class_names
    captions = None
    if labels is not None:
        captions = [names[labels[row]] if labels[row] >= 0 else "no label" for row in rows[order]]
    classes = f", {summary['classes']['count']:,} classes" if summary["classes"] else ""
    # Matplotlib takes a second.
    from raysl.report.contact_sheet import draw_contact_sheet  # noqa: PLC0415

    draw_contact_sheet(
        path,
        [images[index] for index in order],
        captions=captions,
        title=Path(summary["source"]).name or summary["source"],
        subtitle=f"{summary['images']:,} images{classes}; a random sample of {len(rows)}",
    )


def _decode_small(row: int, encoded: Encoded, source: Source) -> Image:
    """Decode an image and shrink it to the size of a contact sheet."""
    image = decode(encoded, source.decoding(row), where=source.where(row))
    shrink = _SHEET_SIDE_PX / max(image.shape[:2])
    if shrink >= 1:
        return image
    height, width = (max(1, round(side * shrink)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
