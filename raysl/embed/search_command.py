"""`raysl search`: find the nearest neighbours of images among embeddings."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table

from raysl.embed.embeddings import Embeddings
from raysl.embed.images import embed_config, open_queries, reopen_source
from raysl.embed.pictures import SearchResult, draw_result, neighbors_of
from raysl.embed.search import search
from raysl.embed.search_all import search_all
from raysl.embed.shards import result_file
from raysl.embed.source import encoder_file
from raysl.errors import ConfigError, DataError
from raysl.evaluate.embedding import EmbeddingSpec, encoder_digest, features_here
from raysl.report.terminal import console, print_json, say, say_notes
from raysl.sources.source import Source

_TABLE_QUERIES, _TABLE_NEIGHBORS = 8, 5

_CENTER_HELP = "subtract the mean of all features before comparing, so that cosines differ more"

_EPILOG = """\
Without --query and --rows, the neighbours of every image among the other images are written to
EMBEDDINGS/_neighbors.parquet (or --out): row, id, neighbor_rows (-1 where there is none),
similarities.

  raysl search embeddings/ --query cat.jpg -k 10 --grid neighbours.png
  raysl search embeddings/ --rows 0,17,42 --grid neighbours.png
  raysl search embeddings/                             neighbours of every image

Similarities are cosines; the search is exact, on the GPU if there is one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("embeddings", help="output of `raysl embed`")
    queries = parser.add_mutually_exclusive_group()
    queries.add_argument(
        "--query", metavar="FILE", help="an image, or a folder of images, to find neighbours of"
    )
    queries.add_argument("--rows", help="rows of the embedded source, such as 0,17,42")
    parser.add_argument("-k", type=int, default=10, help="number of neighbours (10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .parquet file for the result")
    parser.add_argument(
        "--grid", type=Path, metavar="PNG", help="picture of the first queries and their neighbours"
    )
    parser.add_argument("--center", action="store_true", help=_CENTER_HELP)
    parser.add_argument("--encoder", help="path of the encoder, if it was moved")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")


def run(arguments: argparse.Namespace) -> int:
    """Search the neighbours of files, of rows or of every image."""
    if arguments.k < 1:
        raise ConfigError(f"-k {arguments.k}: give at least 1")
    embeddings = Embeddings(arguments.embeddings, center=arguments.center)
    if not len(embeddings):
        raise DataError(f"{arguments.embeddings}: no image has features")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.query is None and arguments.rows is None:
        results = search_all(arguments, embeddings, device)
    else:
        results = _search_queries(arguments, embeddings, device)
    if arguments.json:
        print_json(results)
    return 0


def _search_queries(
    arguments: argparse.Namespace, embeddings: Embeddings, device: torch.device
) -> dict[str, Any]:
    result = (
        _search_files(arguments, embeddings, device)
        if arguments.query is not None
        else _search_rows(arguments, embeddings, device)
    )
    neighbors = [
        _neighbor_values(embeddings, result, number) for number in range(len(result.names))
    ]
    console().print(_table(neighbors))
    if arguments.out is not None:
        _write(arguments.out, neighbors)
        say(f"written: {arguments.out}")
    if arguments.grid is not None:
        draw_result(arguments.grid, embeddings, result)
        say(f"drawn: {arguments.grid}")
    return {"images": len(embeddings), "k": arguments.k, "queries": neighbors}


def _search_files(
    arguments: argparse.Namespace, embeddings: Embeddings, device: torch.device
) -> SearchResult:
    decoding = embed_config(embeddings).decoding()
    source, names = open_queries(arguments.query, decoding=decoding)
    features = _embed_queries(arguments, embeddings, source, len(names))
    queries = torch.from_numpy(features)
    if embeddings.about["settings"]["normalize"]:
        queries = torch.nn.functional.normalize(queries)
    queries = embeddings.to_directions(queries)
    neighbors = search(embeddings, queries, k=arguments.k, device=device)
    return SearchResult(names, [None] * len(names), neighbors, source, list(range(len(names))))


def _embed_queries(
    arguments: argparse.Namespace, embeddings: Embeddings, source: Source, count: int
) -> npt.NDArray[np.float32]:
    """Embed queries with the encoder and the settings that made the embeddings."""
    about = embeddings.about
    encoder = encoder_file(arguments.encoder or about["encoder_path"])
    if encoder_digest(encoder) != about["wanted"]["encoder"]:
        raise DataError(
            f"{encoder}: not the encoder that made {arguments.embeddings} (digest "
            f"{about['wanted']['encoder']}); give that one by --encoder"
        )
    settings = about["settings"]
    embedding = EmbeddingSpec(
        str(encoder), about["size_px"], settings["crop_fraction"], settings["precision"]
    )
    threads = torch.get_num_threads()
    features, bad = features_here(source, np.arange(count), embedding, num_threads=threads)
    if bad:
        row, reason = next(iter(bad.items()))
        raise DataError(f"--query {source.where(row)}: {reason}")
    return features


def _search_rows(
    arguments: argparse.Namespace, embeddings: Embeddings, device: torch.device
) -> SearchResult:
    try:
        rows = [int(row) for row in arguments.rows.split(",")]
    except ValueError:
        raise ConfigError(f"--rows {arguments.rows}: give whole numbers, such as 0,17,42") from None
    positions = embeddings.positions_of(rows)
    neighbors = search(
        embeddings,
        embeddings.directions(positions),
        k=arguments.k,
        device=device,
        own_positions=torch.from_numpy(positions),
    )
    labels = [embeddings.label_name(int(position)) for position in positions]
    source = reopen_source(embeddings)
    say_notes(source, title=f"{source.name}:")
    return SearchResult(embeddings.ids(positions), labels, neighbors, source, rows)


def _neighbor_values(embeddings: Embeddings, result: SearchResult, number: int) -> dict[str, Any]:
    """Return a query and its neighbours as plain values, for ``--json``."""
    positions, similarities = neighbors_of(result.neighbors, number)
    return {
        "query": result.names[number],
        "label": result.labels[number],
        "neighbors": [
            {
                "id": name,
                "row": int(embeddings.rows[position]),
                "similarity": similarity,
                "label": embeddings.label_name(int(position)),
            }
            for name, position, similarity in zip(
                embeddings.ids(positions), positions, similarities, strict=True
            )
        ],
    }


def _table(queries: list[dict[str, Any]]) -> Table:
    table = Table(title="Nearest images", title_justify="left")
    for column in ("query", "neighbour", "similarity", "label"):
        table.add_column(column, justify="right" if column == "similarity" else "left")
    for query in queries[:_TABLE_QUERIES]:
        for number, near in enumerate(query["neighbors"][:_TABLE_NEIGHBORS]):
            name = query["query"] if number == 0 else ""
            table.add_row(name, near["id"], f"{near['similarity']:.4f}", near["label"] or "")
    return table


def _write(path: Path, queries: list[dict[str, Any]]) -> None:
    table = pa.table(
        {
            "query": [query["query"] for query in queries],
            "neighbor_ids": [[near["id"] for near in q["neighbors"]] for q in queries],
            "neighbor_rows": [[near["row"] for near in q["neighbors"]] for q in queries],
            "similarities": [[near["similarity"] for near in q["neighbors"]] for q in queries],
        }
    )
    with result_file(path) as stream:
        pq.write_table(table, stream)
