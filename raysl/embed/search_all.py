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
from raysl.embed.pictures import GRID_ROWS, SearchResult, draw_result
from raysl.embed.search import Neighbors, neighbors_of_all, search
from raysl.embed.shards import result_file
from raysl.report.progress import CountView
from raysl.report.terminal import console, say, say_notes

NEIGHBORS = "_neighbors.parquet"


def search_all(
    arguments: argparse.Namespace, embeddings: Embeddings, device: torch.device
) -> dict[str, Any]:
    """Write the neighbours of every image among the others, and return a summary of them."""
    view = CountView()
    view.begin("searching", total=len(embeddings), done=0)
    nearest_sum, same, labelled = 0.0, 0, 0
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
        for start, neighbors in neighbors_of_all(
            embeddings, k=arguments.k, device=device, advance=view.advance
        ):
            writer.write_table(_table(embeddings, start, neighbors, schema))
            has_neighbor = neighbors.places[:, 0] >= 0
            nearest_sum += float(neighbors.similarities[has_neighbor, 0].sum())
            same_label, with_label = _same_label(embeddings, start, neighbors)
            same, labelled = same + same_label, labelled + with_label
    results: dict[str, Any] = {
        "images": len(embeddings),
        "k": arguments.k,
        "mean_nearest_similarity": nearest_sum / len(embeddings),
        "nearest_has_same_label": same / labelled if labelled else None,
        "out": str(place),
    }
    shown = f"mean similarity to the nearest {results['mean_nearest_similarity']:.4f}"
    if labelled:
        shown += f"; the nearest has the same label: {same / labelled:.1%}"
    console().print(f"{len(embeddings):,} images, {shown}", markup=False)
    say(f"written: {place}")
    if arguments.grid is not None:
        draw_result(arguments.grid, embeddings, _spread(embeddings, arguments.k, device))
        say(f"drawn: {arguments.grid}")
    return results


def _table(embeddings: Embeddings, start: int, neighbors: Neighbors, schema: pa.Schema) -> pa.Table:
    near = neighbors.places.numpy()
    rows = np.where(near >= 0, embeddings.rows[near], -1)
    columns = [
        pa.array(embeddings.rows[start : start + len(near)]),
        pa.array(embeddings.ids(np.arange(start, start + len(near))), pa.string()),
        _lists(rows),
        _lists(neighbors.similarities.numpy()),
    ]
    return pa.table(columns, schema=schema)


def _lists(values: "np.ndarray[Any, Any]") -> pa.ListArray:
    count, width = values.shape
    offsets = pa.array(np.arange(0, (count + 1) * width, width, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def _same_label(embeddings: Embeddings, start: int, neighbors: Neighbors) -> tuple[int, int]:
    """Count the images whose nearest neighbour has their label, and those where both have one."""
    if embeddings.labels is None:
        return 0, 0
    own_labels = embeddings.labels[start : start + len(neighbors.places)]
    nearest = neighbors.places[:, 0].numpy()
    nearest_labels = embeddings.labels[np.maximum(nearest, 0)]
    labelled = (own_labels >= 0) & (nearest_labels >= 0) & (nearest >= 0)
    return int((own_labels == nearest_labels)[labelled].sum()), int(labelled.sum())


def _spread(embeddings: Embeddings, k: int, device: torch.device) -> SearchResult:
    """Return evenly spaced images of the source with their neighbours, for the picture."""
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
