"""The results of a search, and their picture."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.embed.embeddings import Embeddings
from raysl.embed.images import open_again, squares
from raysl.embed.pictures import GridImage, draw_neighbor_grid
from raysl.embed.search import Neighbors
from raysl.sources.source import Source

GRID_ROWS = 8
_GRID_COLUMNS = 10


class SearchResult(NamedTuple):
    """Queries and their neighbours."""

    names: list[str]
    labels: list[str | None]
    neighbors: Neighbors
    source: Source  # of the queries
    rows: list[int]  # of the queries in it


def known(neighbors: Neighbors, number: int) -> tuple[npt.NDArray[np.int64], list[float]]:
    """Return the places that were found for a query, and their similarities."""
    places = neighbors.places[number].numpy()
    there = places >= 0
    return places[there], neighbors.similarities[number].numpy()[there].tolist()


def draw_found(path: Path, embeddings: Embeddings, found: SearchResult) -> None:
    """Draw the first few queries with their neighbours."""
    source = open_again(embeddings)
    count = min(GRID_ROWS, len(found.names))
    query_images = squares(found.source, found.rows[:count])
    lines = []
    for number in range(count):
        places, similarities = known(found.neighbors, number)
        places = places[:_GRID_COLUMNS]
        images = squares(source, embeddings.rows[places].tolist())
        names = embeddings.ids(places)
        line = [GridImage(query_images[number], found.labels[number], note=found.names[number])]
        line += [
            GridImage(image, embeddings.label_name(int(place)), similarity, name)
            for image, place, similarity, name in zip(
                images, places, similarities, names, strict=False
            )
        ]
        lines.append(line)
    title = f"Nearest of {len(embeddings):,} images by cosine similarity"
    draw_neighbor_grid(path, lines, title=title)
