"""Which classes are taken for which: a matrix of few classes, the worst pairs of many."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
_LABEL_IN = 0.075  # width of a letter of a class name
_PAIR_IN = 0.25
_SHADES = LinearSegmentedColormap.from_list("white to blue", ["#FFFFFF", BLUE])


def confusion_matrix(labels: Labels, predictions: Labels, *, num_classes: int) -> Labels:
    """Count ``(C, C)`` test images by true class (row) and told class (column).

    Args:
        labels: ``(N,)`` class numbers; images of label -1 are not counted.
        predictions: ``(N,)`` class numbers.
        num_classes: C.
    """
    known = labels >= 0
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (labels[known], predictions[known]), 1)
    return counts


def draw_confusion(
    path: Path, labels: Labels, predictions: Labels, class_names: Sequence[str]
) -> None:
    """Draw the confusions of up to 20 classes as a matrix, of more as the 20 worst pairs.

    Args:
        path: PNG to write.
        labels: ``(N,)`` class numbers, -1 unknown.
        predictions: ``(N,)`` class numbers.
        class_names: By number; classes beyond it are called by their number.

    Raises:
        DataError: If there are no labels.
    """
    if not (labels >= 0).any():
        raise DataError("no labels: there are no confusions to draw")
    num_classes = int(max(labels.max(), predictions.max(), len(class_names) - 1)) + 1
    counts = confusion_matrix(labels, predictions, num_classes=num_classes)
    names = [
        drawable_name(
            str(class_names[number]) if number < len(class_names) else "",
            otherwise=f"class {number}",
        )
        for number in range(num_classes)
    ]
    if num_classes <= MOST_IN_MATRIX:
        _draw_matrix(path, counts, names)
    else:
        _draw_pairs(path, counts, names)


def _draw_matrix(path: Path, counts: Labels, names: Sequence[str]) -> None:
    num = len(names)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    longest_in = _LABEL_IN * max(map(len, names))
    cell_in = min((NARROW_IN - longest_in - 0.5) / num, 0.62)
    stands = longest_in > 0.9 * cell_in
    below_in = longest_in if stands else 0.15
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
    axes.set_xticks(range(num), names, rotation=90 if stands else 0, **place)
    axes.set_yticks(range(num), names, **place)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(-0.5, num), minor=True)
    axes.set_yticks(np.arange(-0.5, num), minor=True)
    axes.grid(which="minor", color="#EEEEEE", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("told to be", fontsize=9.5, color=INK)
    axes.set_ylabel("is", fontsize=9.5, color=INK)
    axes.set_title("Of each class (row), % told to be", loc="left", fontsize=9.5, color=INK)
    save_png(figure, path)


def _percent_text(value: float) -> str:
    return "<1" if value < 0.5 else f"{value:.0f}"


def worst_pairs(counts: Labels, *, most: int = _NUM_PAIRS) -> npt.NDArray[np.int64]:
    """Return the pairs ``(P, 2)`` (true, told) of two classes that are confused most often.

    By the share of the true class's images; of equal shares the pair of more images.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = np.nonzero(counts * (1 - np.eye(len(counts), dtype=np.int64)))
    order = np.lexsort((-counts[rows, columns], -shares[rows, columns]))[:most]
    return np.stack([rows[order], columns[order]], axis=1)


def _draw_pairs(path: Path, counts: Labels, names: Sequence[str]) -> None:
    pairs = worst_pairs(counts)
    if not len(pairs):
        raise DataError("no class is taken for another: there is nothing to draw")
    totals = np.maximum(counts.sum(axis=1), 1)
    figure = new_figure(width_in=NARROW_IN, height_in=0.95 + _PAIR_IN * len(pairs))
    axes = figure.subplots()
    right = 100 * counts.trace() / max(counts.sum(), 1)
    style_axes(
        axes,
        title=f"The {len(pairs)} worst confusions of {len(names):,} classes\n"
        f"({right:.1f} % of all images are told right)",
        grid="x",
    )
    values = 100 * counts[pairs[:, 0], pairs[:, 1]] / totals[pairs[:, 0]]
    axes.barh(range(len(pairs)), values, 0.7, color=BLUE)
    for place, (true, told) in enumerate(pairs.tolist()):
        text = f"{values[place]:.0f} % ({counts[true, told]} of {totals[true]})"
        axes.annotate(
            text,
            (values[place], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    texts = [f"{names[true]} as {names[told]}" for true, told in pairs.tolist()]
    axes.set_yticks(range(len(pairs)), texts, fontsize=8.5, parse_math=False)
    axes.set(ylim=(len(pairs) - 0.4, -0.6), xlim=(0, max(values) * 1.5))
    axes.set_xlabel("of the class's images, %", fontsize=9, color=INK)
    save_png(figure, path)
