"""Draw the pictures of a run: its views, its curves, its accuracy and the map of its features."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from raysl.augment.crop import Image
from raysl.augment.pipeline import View, make_views
from raysl.data.decode import Flaw, decode_or_flaw
from raysl.errors import DataError, DecodeError
from raysl.report.curves import draw_curves
from raysl.report.feature_map import draw_map
from raysl.report.figure import (
    BLUE,
    DPI,
    GREY,
    INK,
    ORANGE,
    new_figure,
    save_png,
    show_pixels,
    style_axes,
)
from raysl.sources.source import Source
from raysl.track.results import Features, Results, measured_probes, score_of

__all__ = ["draw_accuracy", "draw_curves", "draw_grid", "draw_map", "draw_views"]

ENCODERS: tuple[tuple[Features, str], ...] = (
    ("", "Pretrained"),
    ("untrained_", "Before training"),
    ("pixels_", "Bare pixels"),
)
"""Key prefix in ``results.json``, and name of the measured encoder."""

_CELL_IN = 1.1
_GAP = 0.04  # around an image, relative to a cell
_MAX_VIEWS = 11


def draw_views(
    path: Path, *, source: Source, views: Sequence[View], seed: int, num_images: int = 8
) -> None:
    """Draw images and the views of them that the method saw in epoch 0.

    One row per image: the original, then at most 11 of its views. Images are evenly spaced over
    the source.

    Args:
        path: PNG to write.
        source: The training images.
        views: The kinds of view.
        seed: The run's seed, which reproduces the views of training.
        num_images: Number of rows.

    Raises:
        DecodeError: If none of the images tried can be decoded; single bad images are left out.
    """
    total = int(source.group_sizes.sum())
    rows = np.unique(np.linspace(0, total - 1, min(num_images, total)).astype(np.int64))
    grid: list[list[Image]] = []
    for row, encoded in zip(rows.tolist(), source.read(rows), strict=True):
        image = decode_or_flaw(encoded, source.decoding(row))
        if isinstance(image, Flaw):
            continue
        image_views = make_views(image, views, seed=seed, epoch=0, index=row)
        grid.append([image, *(view for kind in image_views for view in kind)][: _MAX_VIEWS + 1])
    if not grid:
        raise DecodeError(f"{source.name}: none of the {len(rows)} images tried can be decoded")
    sizes = [view.size_px for view in views for _ in range(view.count)]
    heads = ["original\n" + _size_of([line[0] for line in grid])]
    heads += [f"view {number}\n{size} px" for number, size in enumerate(sizes[:_MAX_VIEWS], 1)]
    save_png(_image_grid(grid, heads), path)


def _size_of(images: Sequence[Image]) -> str:
    shapes = {image.shape[:2] for image in images}
    if len(shapes) > 1:
        return "various sizes"
    height, width = shapes.pop()
    return f"{width} x {height} px" if width != height else f"{width} px"


class Grid(NamedTuple):
    """Images in rows and columns, as stored in ``method_pictures.npz``."""

    pixels: npt.NDArray[np.uint8]  # (rows, columns, S, S, 3)
    columns: list[str]
    caption: str


def read_method_pictures(path: Path) -> dict[str, Grid]:
    """Return the pictures that a method saved, by name; empty if there is no such file.

    Raises:
        DataError: If the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {
                name: Grid(
                    arrays[name],
                    arrays[f"{name}.columns"].tolist(),
                    str(arrays[f"{name}.caption"]),
                )
                for name in arrays.files
                if "." not in name
            }
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: damaged: {error}") from None


def draw_grid(path: Path, grid: Grid) -> None:
    """Draw a method's picture, with a title over each column."""
    heads = grid.columns or [""] * grid.pixels.shape[1]
    save_png(_image_grid([list(row) for row in grid.pixels], heads), path)


def _image_grid(grid: Sequence[Sequence[Image]], heads: Sequence[str]) -> Figure:
    """Arrange images of any size in square cells, row by row, with a heading for each column."""
    num_rows, num_columns = len(grid), len(heads)
    head = 0.45
    figure = new_figure(width_in=num_columns * _CELL_IN, height_in=(num_rows + head) * _CELL_IN)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for row, line in enumerate(grid):
        for column, image in enumerate(line):
            _put_image(axes, image, left=column, top=row)
    for column, text in enumerate(heads):
        axes.text(column + 0.5, -0.08, text, ha="center", va="baseline", fontsize=8.5, color=INK)
    axes.set(xlim=(0, num_columns), ylim=(num_rows, -head), aspect="equal")
    axes.set_axis_off()
    return figure


def _put_image(axes: Axes, image: Image, *, left: float, top: float) -> None:
    height, width = image.shape[:2]
    room = 1 - 2 * _GAP
    wide, high = room * width / max(height, width), room * height / max(height, width)
    x, y = left + (1 - wide) / 2, top + (1 - high) / 2
    show_pixels(axes, image, extent=(x, x + wide, y + high, y), room_px=_CELL_IN * DPI)


def draw_accuracy(path: Path, results: Results) -> None:
    """Draw accuracies as bars: the network after and before training, and the bare pixels.

    Args:
        path: PNG to write.
        results: Content of ``results.json``, with accuracies in [0, 1]; missing ones are left out.

    Raises:
        DataError: If the results contain no accuracy.
    """
    if not measured_probes(results):
        raise DataError("the results hold no accuracy to draw")
    figure = new_figure(height_in=3.4)
    axes = figure.subplots()
    style_axes(axes, title="", grid="y")
    probes = measured_probes(results)
    measured = measured_encoders(results)
    colors = dict(zip(ENCODERS, (BLUE, ORANGE, GREY), strict=True))
    drawn = [(encoder, colors[encoder]) for encoder in measured]
    for number, ((features, _), color) in enumerate(drawn):
        values = [accuracy(results, features, probe) for probe in probes]
        _draw_bars(axes, values, color=color, shift=0.27 * (number - (len(drawn) - 1) / 2))
    handles: list[Artist] = [Patch(color=color, label=name) for (_, name), color in drawn]
    if results.get("num_classes"):
        chance = axes.axhline(100 / results["num_classes"], color=INK, linewidth=1, linestyle=":")
        chance.set_label("Chance, equal classes")
        handles.append(chance)
    axes.set_xlim(-0.6, len(probes) - 0.4)
    axes.set_xticks(range(len(probes)), [probe_name(probe, results) for probe in probes])
    axes.tick_params(axis="x", labelsize=9.5)
    axes.set(ylim=(0, 112), yticks=range(0, 101, 20))
    axes.set_ylabel("top-1 accuracy, % (axis: 0 to 100)", fontsize=9, color=INK)
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": 4, "frameon": False}
    figure.legend(handles=handles, fontsize=8, columnspacing=1.2, **place)
    save_png(figure, path)


def measured_encoders(results: Results) -> list[tuple[Features, str]]:
    """Return the entries of ``ENCODERS`` with at least one accuracy in the results."""
    probes = measured_probes(results)
    return [
        (features, name)
        for features, name in ENCODERS
        if any(score_of(results, probe, features) is not None for probe in probes)
    ]


def accuracy(results: Results, features: Features, probe: str) -> tuple[float, float | None] | None:
    """Return an accuracy and its standard deviation over seeds, if any, in percent; else None."""
    score = score_of(results, probe, features)
    if score is None:
        return None
    return 100 * score.mean, None if score.deviation is None else 100 * score.deviation


def percent(value: float | None) -> float | None:
    """Return an accuracy of [0, 1] in percent; None if it is missing or not finite."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return 100 * value


def probe_name(probe: str, results: Results) -> str:
    """Return a probe's name for readers."""
    labels = results.get("few_shot_labels", "few")
    return {
        "knn": "Nearest neighbours",
        "linear": "Linear by SGD, all labels",
        "linear_lbfgs": "Linear, all labels",
        "few_shot": f"Linear, {labels} label{'' if labels == 1 else 's'} per class",
    }[probe]


def _draw_bars(
    axes: Axes, values: Sequence[tuple[float, float | None] | None], *, color: str, shift: float
) -> None:
    for position, result in enumerate(values):
        if result is None:
            continue
        value, std = result
        axes.bar(position + shift, value, 0.25, color=color)
        if std:
            line: dict[str, Any] = {"ecolor": INK, "elinewidth": 1, "capsize": 3}
            axes.errorbar(position + shift, value, yerr=std, fmt="none", **line)
        top = value + (std or 0) + 1
        style: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8.5, "color": INK}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.text(position + shift, top, f"{value:.1f}", **style)
