"""Write the neighbours of every embedded image to a file."""

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raysl.embed.embeddings import Embeddings
from raysl.embed.images import open_again
from raysl.embed.search import Neighbors, neighbors_of_all, search
from raysl.embed.search_result import GRID_ROWS, SearchResult, draw_found
from raysl.embed.shards import result_file
from raysl.report.progress import CountView
from raysl.report.terminal import console, say, say_notes

NEIGHBORS = "_neighbors.parquet"


def search_all(
    arguments: argparse.Namespace, embeddings: Embeddings, device: torch.device
) -> dict[str, Any]:
    """Find the neighbours of every image among the others, write and sum them up."""
    view = CountView()
    view.begin("searching", total=len(embeddings), done=0)
    nearest_sum, right, labelled = 0.0, 0, 0
    place: str | Path = arguments.out or f"{embeddings.folder.uri}/{NEIGHBORS}"
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("id", pa.string()),
            ("neighbor_rows", pa.list_(pa.int64())),
            ("similarities", pa.list_(pa.float32())),
        ]
    )
    with (
        closing(view),
        result_file(place) as stream,
        pq.ParquetWriter(stream, schema) as writer,
    ):
        for start, found in neighbors_of_all(
            embeddings, k=arguments.k, device=device, advance=view.advance
        ):
            writer.write_table(_table(embeddings, start, found, schema))
            there = found.places[:, 0] >= 0
            nearest_sum += float(found.similarities[there, 0].sum())
            ours, of = _same_label(embeddings, start, found)
            right, labelled = right + ours, labelled + of
    results: dict[str, Any] = {
        "images": len(embeddings),
        "k": arguments.k,
        "mean_nearest_similarity": nearest_sum / len(embeddings),
        "nearest_has_same_label": right / labelled if labelled else None,
        "out": str(place),
    }
    shown = f"mean similarity to the nearest {results['mean_nearest_similarity']:.4f}"
    if labelled:
        shown += f"; the nearest has the same label: {right / labelled:.1%}"
    console().print(f"{len(embeddings):,} images, {shown}", markup=False)
    say(f"written: {place}")
    if arguments.grid is not None:
        draw_found(arguments.grid, embeddings, _spread(embeddings, arguments.k, device))
        say(f"drawn: {arguments.grid}")
    return results


def _table(embeddings: Embeddings, start: int, found: Neighbors, schema: pa.Schema) -> pa.Table:
    near = found.places.numpy()
    rows = np.where(near >= 0, embeddings.rows[near], -1)
    columns = [
        pa.array(embeddings.rows[start : start + len(near)]),
        pa.array(embeddings.ids(np.arange(start, start + len(near))), pa.string()),
        _lists(rows),
        _lists(found.similarities.numpy()),
    ]
    return pa.table(columns, schema=schema)


def _lists(values: "np.ndarray[Any, Any]") -> pa.ListArray:
    count, width = values.shape
    offsets = pa.array(np.arange(0, (count + 1) * width, width, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def _same_label(embeddings: Embeddings, start: int, found: Neighbors) -> tuple[int, int]:
    """How many nearest neighbours are of the image's class, and of how many that is known."""
    if embeddings.labels is None:
        return 0, 0
    mine = embeddings.labels[start : start + len(found.places)]
    nearest = found.places[:, 0].numpy()
    theirs = embeddings.labels[np.maximum(nearest, 0)]
    known = (mine >= 0) & (theirs >= 0) & (nearest >= 0)
    return int((mine == theirs)[known].sum()), int(known.sum())


def _spread(embeddings: Embeddings, k: int, device: torch.device) -> SearchResult:
    """Queries from all over the source, for the picture."""
    count = min(GRID_ROWS, len(embeddings))
    places = np.linspace(0, len(embeddings) - 1, count).astype(np.int64)
    own = torch.from_numpy(places)
    neighbors = search(
        embeddings, embeddings.directions(places), k=k, device=device, own_places=own
    )
    labels = [embeddings.label_name(int(place)) for place in places]
    rows = embeddings.rows[places].tolist()
    source = open_again(embeddings)
    say_notes(source, title=f"{source.name}:")
    return SearchResult(embeddings.ids(places), labels, neighbors, source, rows)
