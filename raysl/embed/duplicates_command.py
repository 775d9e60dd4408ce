"""`raysl duplicates`: find near-duplicates among embeddings, and list those to drop."""

import argparse
import json
import math
import shlex
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from rich.table import Table

from raysl.embed.duplicates import Choice, Duplicates, choose, find_duplicates
from raysl.embed.embeddings import Embeddings
from raysl.embed.images import reopen_source, squares
from raysl.embed.pictures import GridImage, draw_duplicate_sheet
from raysl.embed.shards import result_file
from raysl.errors import ConfigError
from raysl.report.progress import CountView
from raysl.report.terminal import console, print_json, say, say_notes

_THRESHOLD = 0.98
_LEVELS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
_SHEET_LINES, _SHEET_IMAGES = 12, 7
_GROUPS_FILE, _DROP_FILE = "_duplicates.parquet", "_drop.txt"
_LARGE_GROUP = 5

_EPILOG = """\
Images connected by similarities of at least the threshold (cosines of the features minus their
mean) form a group. In a group, an image is kept unless its similarity to an image kept before
reaches the threshold. EMBEDDINGS/_duplicates.parquet (or --out, .parquet or .csv) holds group, row,
id, keep, like_row (the most similar kept image) and similarity (to it). EMBEDDINGS/_drop.txt (or
--drop) lists the ids of the other images, one per line; it filters any kind of source:

  raysl duplicates embeddings/ --threshold 0.99 --contact-sheet duplicates.png --drop drop.txt
  raysl pretrain CONFIG data.source=photos/ data.filter='[[row_id, not in file, drop.txt]]'

What is a duplicate depends on the encoder. Before dropping anything, look at the sheet and at the
table, which counts the images with a neighbour of at least each similarity.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("embeddings", help="output of `raysl embed`")
    parser.add_argument(
        "--threshold", type=float, default=_THRESHOLD, help=f"similarity in (0, 1] ({_THRESHOLD})"
    )
    parser.add_argument(
        "--no-center",
        action="store_true",
        help="compare plain cosines, without subtracting the mean",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .parquet or .csv file")
    parser.add_argument("--drop", type=Path, metavar="FILE", help="text file of ids to drop")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="a picture of groups")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> int:
    """Group near-duplicates, and write which images to keep and which to drop."""
    if not (math.isfinite(arguments.threshold) and 0 < arguments.threshold <= 1):
        raise ConfigError(f"--threshold {arguments.threshold}: give a number in (0, 1]")
    if arguments.out is not None and arguments.out.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--out {arguments.out}: give a .parquet or a .csv file")
    embeddings = Embeddings(arguments.embeddings, center=not arguments.no_center)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    view = CountView()
    with closing(view):
        view.begin("comparing", total=len(embeddings), done=0)
        duplicates = find_duplicates(
            embeddings, threshold=arguments.threshold, device=device, advance=view.advance
        )
    choices = _choices(embeddings, duplicates, threshold=arguments.threshold)
    table, dropped = _groups_table(embeddings, duplicates, choices)
    out = arguments.out or f"{embeddings.folder.uri}/{_GROUPS_FILE}"
    drop = arguments.drop or f"{embeddings.folder.uri}/{_DROP_FILE}"
    with result_file(out) as stream:
        (pacsv.write_csv if str(out).endswith(".csv") else pq.write_table)(table, stream)
    with result_file(drop) as stream:
        stream.write("".join(f"{name}\n" for name in dropped).encode())
    results = _results(arguments, embeddings, duplicates, dropped=len(dropped))
    results |= {"out": str(out), "drop": str(drop)}
    _say_results(results)
    if arguments.contact_sheet is not None:
        sheet, threshold = arguments.contact_sheet, arguments.threshold
        _draw(sheet, embeddings, duplicates, choices, threshold=threshold)
    if arguments.json:
        print_json(results)
    return 0


def _choices(embeddings: Embeddings, duplicates: Duplicates, *, threshold: float) -> list[Choice]:
    return [
        choose(embeddings.directions(group), threshold=threshold) for group in duplicates.groups
    ]


def _groups_table(
    embeddings: Embeddings, duplicates: Duplicates, choices: list[Choice]
) -> tuple[pa.Table, list[str]]:
    """Return a table with a row for each image of a group, and the ids of those to drop."""
    positions = np.concatenate([np.empty(0, dtype=np.int64), *duplicates.groups])
    by = [group[choice.by] for group, choice in zip(duplicates.groups, choices, strict=True)]
    numbers = np.repeat(
        np.arange(len(duplicates.groups)), [len(group) for group in duplicates.groups]
    )
    keep = np.concatenate([np.empty(0, dtype=np.bool_), *(choice.kept for choice in choices)])
    similarity = [np.empty(0, dtype=np.float32), *(choice.similarity for choice in choices)]
    ids = embeddings.ids(positions)
    kept_positions = np.concatenate([np.empty(0, dtype=np.int64), *by])
    columns: dict[str, Any] = {
        "group": pa.array(numbers, pa.int64()),
        "row": pa.array(embeddings.rows[positions], pa.int64()),
        "id": pa.array(ids, pa.string()),
        "keep": pa.array(keep),
        "like_row": pa.array(embeddings.rows[kept_positions], pa.int64()),
        "similarity": pa.array(np.concatenate(similarity), pa.float32()),
    }
    if embeddings.labels is not None:
        labels = [embeddings.label_name(int(position)) for position in positions]
        columns["label"] = pa.array(labels, pa.string())
    return pa.table(columns), [
        row_id for row_id, is_kept in zip(ids, keep, strict=True) if not is_kept
    ]


def _results(
    arguments: argparse.Namespace, embeddings: Embeddings, duplicates: Duplicates, *, dropped: int
) -> dict[str, Any]:
    levels = sorted({*_LEVELS, arguments.threshold})
    return {
        "images": len(embeddings),
        "threshold": arguments.threshold,
        "groups": len(duplicates.groups),
        "in_groups": sum(map(len, duplicates.groups)),
        "pairs": duplicates.num_pairs,
        "to_drop": dropped,
        "largest_group": max(map(len, duplicates.groups), default=0),
        "groups_of_several_labels": _count_mixed_groups(embeddings, duplicates),
        "with_neighbor_above": {
            f"{level:g}": int((duplicates.nearest >= level).sum()) for level in levels
        },
    }


def _count_mixed_groups(embeddings: Embeddings, duplicates: Duplicates) -> int | None:
    """Count the groups whose images have different labels, of which some may be wrong.

    None if the source has no labels.
    """
    if embeddings.labels is None:
        return None
    labels = (embeddings.labels[group] for group in duplicates.groups)
    return sum(len(np.unique(each[each >= 0])) > 1 for each in labels)


def _say_results(results: dict[str, Any]) -> None:
    images = results["images"]
    table = Table(title="Images with another of at least this similarity", title_justify="left")
    table.add_column("similarity", justify="right")
    table.add_column("images", justify="right")
    table.add_column("share", justify="right")
    for level, count in results["with_neighbor_above"].items():
        style = "bold" if float(level) == results["threshold"] else None
        table.add_row(level, f"{count:,}", f"{count / max(1, images):.2%}", style=style)
    out = console()
    out.print(table)
    several_labels = results["groups_of_several_labels"]
    mixed = f" ({several_labels:,} of them with several labels)" if several_labels else ""
    out.print(
        f"{results['groups']:,} groups at similarity {results['threshold']:g}{mixed}; "
        f"{results['to_drop']:,} of {images:,} images to drop; largest group: "
        f"{results['largest_group']:,} images",
        markup=False,
    )
    say(f"written: {results['out']}, {results['drop']}")
    if results["to_drop"]:
        condition = f"[[row_id, not in file, {json.dumps(results['drop'])}]]"
        say(f"to leave them out: {shlex.quote(f'data.filter={condition}')}")
    if results["largest_group"] > max(_LARGE_GROUP, images // 20):
        say("the largest group is a chain of similar images; a higher threshold breaks it up")


def _draw(
    path: Path,
    embeddings: Embeddings,
    duplicates: Duplicates,
    choices: list[Choice],
    *,
    threshold: float,
) -> None:
    """Draw kept images, each in a row with its duplicates; the most similar rows come first."""
    lines = []
    for group, choice in zip(duplicates.groups, choices, strict=True):
        for kept in np.flatnonzero(choice.kept):
            others = np.flatnonzero((choice.by == kept) & ~choice.kept)
            others = others[np.argsort(choice.similarity[others], kind="stable")]
            if len(others):  # the least similar come first, to be checked by eye
                lines.append((group, choice, [int(kept), *others[: _SHEET_IMAGES - 1].tolist()]))
    if not lines:
        say(f"no groups at similarity {threshold:g}: nothing was drawn")
        return
    source = reopen_source(embeddings)
    say_notes(source, title=f"{source.name}:")
    lines.sort(key=lambda line: -float(line[1].similarity[line[2][1]]))
    count = min(_SHEET_LINES, len(lines))
    rows = []
    for number in np.linspace(0, len(lines) - 1, count).astype(np.int64).tolist():
        group, choice, members = lines[number]
        positions = group[members]
        images = squares(source, embeddings.rows[positions].tolist())
        ids = embeddings.ids(positions)
        notes = [embeddings.label_name(int(p)) or i for p, i in zip(positions, ids, strict=True)]
        rows.append(
            [
                GridImage(image, None, float(value), note)
                for image, value, note in zip(
                    images, choice.similarity[members], notes, strict=True
                )
            ]
        )
    title = f"{len(lines):,} images with duplicates at similarity {threshold:g}; {count} of them"
    draw_duplicate_sheet(path, rows, title=title)
    say(f"drawn: {path}")
