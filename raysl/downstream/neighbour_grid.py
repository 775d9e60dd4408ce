"""Draw images beside their nearest neighbours, and the mistakes that neighbours agree on."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.augment.crop import Image
from raysl.downstream.evaluation_files import Evaluation
from raysl.errors import DataError
from raysl.report.figure import BLUE, GREY, INK, NARROW_IN, RED, drawable_name
from raysl.report.image_grid import Cell, save_grid

NUM_NEIGHBOURS = 5
NUM_QUERIES = 6

_ROWS_AT_ONCE = 512
_MOST_QUERIES = 2000  # the test images searched for mistakes
_MOST_PX = 224
_CELL_IN = NARROW_IN / (NUM_NEIGHBOURS + 1)
_NAME_LETTERS = 11


class Nearest(NamedTuple):
    """The nearest training images of some test images, in descending similarity."""

    places: npt.NDArray[np.int64]
    """``(Q, k)``, indices of training images."""
    similarities: npt.NDArray[np.float32]
    """``(Q, k)``, cosine similarities."""


def nearest(train: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], *, k: int) -> Nearest:
    """Return the k nearest rows of ``train`` by cosine similarity; all of them if it has fewer.

    Args:
        train: ``(M, D)``, M > 0; rows that are not finite are never neighbours.
        queries: ``(Q, D)``.
        k: > 0.
    """
    bank = _directions(train)
    bank[~np.isfinite(bank).all(axis=1)] = 0.0
    k = min(k, len(bank))
    places = np.zeros((len(queries), k), dtype=np.int64)
    similarities = np.zeros((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), _ROWS_AT_ONCE):
        similarity = _directions(queries[start : start + _ROWS_AT_ONCE]) @ bank.T
        some = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(similarity, some, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        places[start : start + len(some)] = np.take_along_axis(some, order, axis=1)
        similarities[start : start + len(some)] = np.take_along_axis(values, order, axis=1)
    return Nearest(places, similarities)


def vote(
    labels: npt.NDArray[np.int64], close: Nearest, *, temperature: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the class that each query's weighted neighbours vote for, and its share of the votes.

    Args:
        labels: Labels of the training images, ``(M,)``, >= 0.
        close: The neighbours.
        temperature: A neighbour of similarity s votes with exp(s / temperature).

    Returns:
        ``(Q,)`` class numbers and ``(Q,)`` shares in (0, 1].
    """
    relative = close.similarities - close.similarities[:, :1]
    weights = np.exp(relative.astype(np.float64) / temperature)
    # One number for each query and class with a vote, because there may be many classes.
    classes, numbers = np.unique(labels[close.places], return_inverse=True)
    queries = np.arange(len(weights))
    pairs = queries[:, None] * len(classes) + numbers.reshape(weights.shape)
    voted, places = np.unique(pairs, return_inverse=True)
    votes = np.bincount(places.ravel(), weights.ravel())
    of = voted // max(1, len(classes))
    order = np.lexsort((voted, -votes, of))
    first = order[np.searchsorted(of[order], queries)]
    return classes[voted[first] % max(1, len(classes))], votes[first] / weights.sum(axis=1)


def _directions(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    directions: npt.NDArray[np.float32] = features / np.maximum(lengths, np.finfo("f4").tiny)
    return directions


def draw_neighbours(path: Path, evaluation: Evaluation, *, seed: int = 0) -> None:
    """Draw a few random test images, each with its nearest training images.

    Args:
        path: PNG to write.
        evaluation: An evaluation with or without labels.
        seed: Seed of the choice.

    Raises:
        DataError: If no feature is finite.
    """
    queries = evaluation.test.subset(NUM_QUERIES, seed=seed)
    if not len(queries) or not len(evaluation.train.features):
        raise DataError("no image has finite features to look for neighbours of")
    features = evaluation.test.features[queries]
    close = nearest(evaluation.train.features, features, k=NUM_NEIGHBOURS)
    _draw(path, evaluation, queries, close, lambda place, number: ("query",))


def draw_mistakes(path: Path, evaluation: Evaluation, *, k: int, temperature: float) -> None:
    """Draw the misclassified test images whose neighbours agree most, with the nearest neighbours.

    Args:
        path: PNG to write.
        evaluation: An evaluation with labels. Of more than 2,000 test images, a random subset is
            searched.
        k: Number of voting neighbours.
        temperature: Temperature of their votes.

    Raises:
        DataError: If there are no labels, or no mistakes.
    """
    train, test = evaluation.train, evaluation.test
    labelled = np.flatnonzero(train.labels >= 0)
    queries = test.subset(_MOST_QUERIES)
    queries = queries[test.labels[queries] >= 0]
    if not len(labelled) or not len(queries):
        raise DataError("no labels: there are no mistakes to draw")
    close = nearest(train.features[labelled], test.features[queries], k=k)
    predicted, share = vote(train.labels[labelled], close, temperature=temperature)
    wrong = np.flatnonzero(predicted != test.labels[queries])
    if not len(wrong):
        raise DataError("no mistakes among the test images that were looked at")
    # Ties are sorted by the similarity of the nearest neighbour.
    order = np.lexsort((-close.similarities[wrong, 0], -share[wrong]))
    worst = wrong[order][:NUM_QUERIES]
    neighbours = Nearest(
        labelled[close.places[worst, :NUM_NEIGHBOURS]], close.similarities[worst, :NUM_NEIGHBOURS]
    )

    def said(place: int, number: int) -> tuple[str, ...]:
        row = worst[number]
        return (f"told {_short(evaluation.name_of(int(predicted[row])))}",)

    _draw(path, evaluation, queries[worst], neighbours, said)


def _draw(
    path: Path,
    evaluation: Evaluation,
    queries: npt.NDArray[np.int64],
    close: Nearest,
    said: Callable[[int, int], tuple[str, ...]],
) -> None:
    train, test = evaluation.train, evaluation.test
    query_images = test.thumbnails(queries, most_px=_MOST_PX)
    near_images = train.thumbnails(close.places.ravel(), most_px=_MOST_PX)
    rows = []
    for number, place in enumerate(queries.tolist()):
        label = int(test.labels[place])
        name = (_short(evaluation.name_of(label)),) if label >= 0 else ()
        row = [Cell(query_images[number], name + said(place, number), INK)]
        for column, other in enumerate(close.places[number].tolist()):
            similarity = f"{close.similarities[number, column]:.2f}"
            image = near_images[number * close.places.shape[1] + column]
            row.append(_neighbour(evaluation, image, int(train.labels[other]), label, similarity))
        rows.append(row)
    save_grid(path, rows, cell_in=_CELL_IN)


def _neighbour(
    evaluation: Evaluation, image: Image, label: int, wanted: int, similarity: str
) -> Cell:
    if label < 0 or wanted < 0:
        return Cell(image, (similarity,), GREY)
    right = label == wanted
    lines = (_short(evaluation.name_of(label)), similarity)
    return Cell(image, lines, BLUE if right else RED, dashed=not right)


def _short(name: str) -> str:
    short = drawable_name(name, otherwise="(name)")
    return short if len(short) <= _NAME_LETTERS else short[: _NAME_LETTERS - 2] + ".."
