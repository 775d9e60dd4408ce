"""Draw which classes are confused: a matrix for few classes, the worst pairs for many."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from raysl.errors import DataError
from raysl.report.figure import (
    BLUE,
    INK,
    NARROW_IN,
    drawable_name,
    new_figure,
    save_png,
    style_axes,
)
from raysl.sources.source import Labels

MOST_IN_MATRIX = 20

_NUM_PAIRS = 20
_LABEL_IN = 0.075  # estimated width of a letter of a class name
_PAIR_IN = 0.25
_SHADES = LinearSegmentedColormap.from_list("white to blue", ["#FFFFFF", BLUE])


def confusion_matrix(labels: Labels, predictions: Labels, *, num_classes: int) -> Labels:
    """Count ``(C, C)`` test images by true class (row) and predicted class (column).

    Args:
        labels: ``(N,)`` class numbers; images of label -1 are not counted.
        predictions: ``(N,)`` class numbers.
        num_classes: C.
    """
    is_labelled = labels >= 0
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (labels[is_labelled], predictions[is_labelled]), 1)
    return counts


def draw_confusion(
    path: Path, labels: Labels, predictions: Labels, class_names: Sequence[str]
) -> None:
    """Draw confusions: up to 20 classes as a matrix, more classes as the 20 worst pairs.

    Args:
        path: PNG to write.
        labels: ``(N,)`` class numbers, -1 without a label.
        predictions: ``(N,)`` class numbers.
        class_names: Class names by number; classes without a name are called ``class NUMBER``.

    Raises:
        DataError: If there are no labels.
    """
    if not (labels >= 0).any():
        raise DataError("no labels: there are no confusions to draw")
    num_classes = int(max(labels.max(), predictions.max(), len(class_names) - 1)) + 1

    def name_of(number: int) -> str:
        name = str(class_names[number]) if number < len(class_names) else ""
        return drawable_name(name, otherwise=f"class {number}")

    if num_classes <= MOST_IN_MATRIX:
        counts = confusion_matrix(labels, predictions, num_classes=num_classes)
        _draw_matrix(path, counts, [name_of(number) for number in range(num_classes)])
    else:
        _draw_pairs(path, labels, predictions, name_of, num_classes=num_classes)


def _draw_matrix(path: Path, counts: Labels, names: Sequence[str]) -> None:
    num = len(names)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    longest_in = _LABEL_IN * max(map(len, names))
    cell_in = min((NARROW_IN - longest_in - 0.5) / num, 0.62)
    is_vertical = longest_in > 0.9 * cell_in
    below_in = longest_in if is_vertical else 0.15
    figure = new_figure(width_in=NARROW_IN, height_in=cell_in * num + below_in + 0.85)
    axes = figure.subplots()
    axes.imshow(shares, cmap=_SHADES, vmin=0, vmax=100, interpolation="nearest")
    size = 9.0 if num <= 12 else 7.0
    for row, column in np.ndindex(num, num):
        if counts[row, column]:
            axes.text(
                column,
                row,
                _percent_text(shares[row, column]),
                ha="center",
                va="center",
                fontsize=size,
                color="white" if shares[row, column] > 55 else INK,
                fontweight="bold" if row == column else "normal",
            )
    place: dict[str, Any] = {"fontsize": 9.0, "parse_math": False}
    axes.set_xticks(range(num), names, rotation=90 if is_vertical else 0, **place)
    axes.set_yticks(range(num), names, **place)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(-0.5, num), minor=True)
    axes.set_yticks(np.arange(-0.5, num), minor=True)
    axes.grid(which="minor", color="#EEEEEE", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("predicted class", fontsize=9.5, color=INK)
    axes.set_ylabel("true class", fontsize=9.5, color=INK)
    axes.set_title("% of the images of each true class (row)", loc="left", fontsize=9.5, color=INK)
    save_png(figure, path)


def _percent_text(value: float) -> str:
    return "<1" if value < 0.5 else f"{value:.0f}"


class Confusion(NamedTuple):
    """A true class and a wrong class predicted for some of its images."""

    true: int
    predicted: int
    images: int
    """Number of images of the true class with that prediction."""
    total: int
    """Number of images of the true class."""


def worst_pairs(labels: Labels, predictions: Labels, *, most: int = _NUM_PAIRS) -> list[Confusion]:
    """Return the pairs of classes that are confused most often.

    Sorted by the share of the true class's images, then by the number of images. Memory grows with
    the images, not with the classes, of which there may be hundreds of thousands.

    Args:
        labels: ``(N,)`` class numbers; images of label -1 are not counted.
        predictions: ``(N,)`` class numbers.
        most: Maximal number of pairs.
    """
    is_labelled = labels >= 0
    both = np.stack([labels[is_labelled], predictions[is_labelled]], axis=1)
    classes, totals = np.unique(both[:, 0], return_counts=True)
    pairs, counts = np.unique(both[both[:, 0] != both[:, 1]], axis=0, return_counts=True)
    pair_totals = totals[np.searchsorted(classes, pairs[:, 0])]
    order = np.lexsort((-counts, -(counts / pair_totals)))[:most]
    return [
        Confusion(int(pairs[n, 0]), int(pairs[n, 1]), int(counts[n]), int(pair_totals[n]))
        for n in order
    ]


def _draw_pairs(
    path: Path,
    labels: Labels,
    predictions: Labels,
    name_of: Callable[[int], str],
    *,
    num_classes: int,
) -> None:
    pairs = worst_pairs(labels, predictions)
    if not pairs:
        raise DataError("no class is confused with another: there is nothing to draw")
    is_labelled = labels >= 0
    top1 = 100 * float((labels[is_labelled] == predictions[is_labelled]).mean())
    figure = new_figure(width_in=NARROW_IN, height_in=0.95 + _PAIR_IN * len(pairs))
    axes = figure.subplots()
    style_axes(
        axes,
        title=f"The {len(pairs)} worst confusions of {num_classes:,} classes\n"
        f"(top-1 accuracy {top1:.1f} %)",
        grid="x",
    )
    values = [100 * pair.images / pair.total for pair in pairs]
    axes.barh(range(len(pairs)), values, 0.7, color=BLUE)
    for position, pair in enumerate(pairs):
        text = f"{values[position]:.0f} % ({pair.images} of {pair.total})"
        axes.annotate(
            text,
            (values[position], position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    texts = [f"{name_of(pair.true)} as {name_of(pair.predicted)}" for pair in pairs]
    axes.set_yticks(range(len(pairs)), texts, fontsize=8.5, parse_math=False)
    axes.set(ylim=(len(pairs) - 0.4, -0.6), xlim=(0, max(values) * 1.5))
    axes.set_xlabel("% of the class's images", fontsize=9, color=INK)
    save_png(figure, path)
