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
from raysl.embed.images import reopen_source
from raysl.embed.pictures import GRID_ROWS, SearchResult, draw_result
from raysl.embed.search import Neighbors, neighbors_of_all, search
from raysl.embed.shards import result_file
from raysl.report.progress import CountView
from raysl.report.terminal import console, say, say_notes

_FILE_NAME = "_neighbors.parquet"


def search_all(
    arguments: argparse.Namespace, embeddings: Embeddings, device: torch.device
) -> dict[str, Any]:
    """Search the neighbours of every image, write them to a file, and return their statistics.

    Args:
        arguments: The command's arguments: ``out``, ``k`` and ``grid``.
        embeddings: M > 0 images.
        device: Device of the matrix products.
    """
    view = CountView()
    view.begin("searching", total=len(embeddings), done=0)
    nearest_sum, same, labelled = 0.0, 0, 0
    output: str | Path = arguments.out or f"{embeddings.folder.uri}/{_FILE_NAME}"
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
        result_file(output) as stream,
        pq.ParquetWriter(stream, schema) as writer,
    ):
        for start, neighbors in neighbors_of_all(
            embeddings, k=arguments.k, device=device, advance=view.advance
        ):
            writer.write_table(_table(embeddings, start, neighbors, schema))
            has_neighbor = neighbors.positions[:, 0] >= 0
            nearest_sum += float(neighbors.similarities[has_neighbor, 0].sum())
            same_label, with_label = _same_label(embeddings, start, neighbors)
            same, labelled = same + same_label, labelled + with_label
    results: dict[str, Any] = {
        "images": len(embeddings),
        "k": arguments.k,
        # Only a single image has no neighbour; its mean is 0.
        "mean_nearest_similarity": nearest_sum / len(embeddings),
        "nearest_has_same_label": same / labelled if labelled else None,
        "out": str(output),
    }
    summary = f"mean similarity to the nearest image: {results['mean_nearest_similarity']:.4f}"
    if labelled:
        summary += f"; nearest image with the same label: {same / labelled:.1%}"
    console().print(f"{len(embeddings):,} images, {summary}", markup=False)
    say(f"written: {output}")
    if arguments.grid is not None:
        draw_result(arguments.grid, embeddings, _example_result(embeddings, arguments.k, device))
        say(f"drawn: {arguments.grid}")
    return results


def _table(embeddings: Embeddings, start: int, neighbors: Neighbors, schema: pa.Schema) -> pa.Table:
    """Return the rows of the file for a block of images; row -1 means no neighbour."""
    positions = neighbors.positions.numpy()
    rows = np.where(positions >= 0, embeddings.rows[positions], -1)
    columns = [
        pa.array(embeddings.rows[start : start + len(positions)]),
        pa.array(embeddings.ids(np.arange(start, start + len(positions))), pa.string()),
        _lists(rows),
        _lists(neighbors.similarities.numpy()),
    ]
    return pa.table(columns, schema=schema)


def _lists(values: "np.ndarray[Any, Any]") -> pa.ListArray:
    """Return the rows of ``(n, k)`` values as a column of lists."""
    count, width = values.shape
    offsets = pa.array(np.arange(0, (count + 1) * width, width, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def _same_label(embeddings: Embeddings, start: int, neighbors: Neighbors) -> tuple[int, int]:
    """Return how many nearest neighbours have the image's label, of how many labelled pairs."""
    if embeddings.labels is None:
        return 0, 0
    image_labels = embeddings.labels[start : start + len(neighbors.positions)]
    nearest = neighbors.positions[:, 0].numpy()
    nearest_labels = embeddings.labels[np.maximum(nearest, 0)]
    labelled = (image_labels >= 0) & (nearest_labels >= 0) & (nearest >= 0)
    return int((image_labels == nearest_labels)[labelled].sum()), int(labelled.sum())


def _example_result(embeddings: Embeddings, k: int, device: torch.device) -> SearchResult:
    """Search the neighbours of evenly spaced images, for the picture."""
    count = min(GRID_ROWS, len(embeddings))
    positions = np.linspace(0, len(embeddings) - 1, count).astype(np.int64)
    neighbors = search(
        embeddings,
        embeddings.directions(positions),
        k=k,
        device=device,
        own_positions=torch.from_numpy(positions),
    )
    labels = [embeddings.label_name(int(position)) for position in positions]
    rows = embeddings.rows[positions].tolist()
    source = reopen_source(embeddings)
    say_notes(source, title=f"{source.name}:")
    return SearchResult(embeddings.ids(positions), labels, neighbors, source, rows)
