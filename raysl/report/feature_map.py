"""Draw a map of images, on which similar features are close together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from raysl.errors import DataError
from raysl.report.figure import (
    DPI,
    GREY,
    LIGHT_GREY,
    WIDTH_IN,
    drawable_name,
    new_figure,
    save_png,
    show_pixels,
)
from raysl.sources.source import Labels

_MAX_POINTS = 1500
MAX_NAMED_CLASSES = 20
_CLUSTER_STARTS = 3
_MIN_TSNE_POINTS = 20
_PCA_DIMS = 50
_TSNE_ITERATIONS = 500
_MIN_RANGE = 1e-5  # of coordinates; below it all features are the same
_THUMBNAIL_SIDE = 0.055  # relative to the map's side
_NUM_THUMBNAILS = {True: 40, False: 110}  # by whether there are labels
# The scheme "muted" of Tol 2021, "Colour schemes", SRON/EPS/TN/09-002, and black.
_CLASS_COLORS = (
    "#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE",
    "#882255", "#44AA99", "#999933", "#AA4499", "#222222",
)  # fmt: skip


class Mark(NamedTuple):
    """Colour and shape of a class's points."""

    color: str
    shape: str


def draw_map(
    path: Path,
    *,
    features: npt.NDArray[Any],
    labels: Labels,
    class_names: Sequence[str],
    thumbnails: npt.NDArray[np.uint8],
    colors: str = "",
) -> None:
    """Draw a two-dimensional map of features, on which similar features are close together.

    The features, scaled to unit length as for the nearest-neighbour probe, are projected by PCA and
    t-SNE; for fewer than 20 images by PCA alone. At most 1,500 images are drawn, a fixed random
    choice; images with features that are not finite are left out.

    Args:
        path: PNG to write.
        features: ``(M, D)`` float.
        labels: ``(M,)`` class numbers; -1 for images without a label.
        class_names: Class names, by class number; the legend names up to 20 classes.
        thumbnails: ``(M, S, S, 3)`` uint8 images.
        colors: Meaning of the colours, if they are not labels; appended to the title.

    Raises:
        DataError: If no image has finite features.
    """
    rows = np.flatnonzero(np.isfinite(features).all(axis=1))
    if not len(rows):
        raise DataError("no image has finite features to draw")
    rows = np.random.default_rng(0).permutation(rows)[:_MAX_POINTS]
    points, projection = _project(features[rows])
    classes = np.unique(labels[rows][labels[rows] >= 0]).tolist()
    marks = [mark_of(label, classes) for label in labels[rows].tolist()]
    names = _names(labels[rows], classes, class_names)
    columns = 5 if max(map(len, names.values()), default=0) <= 12 else 4
    figure = new_figure(height_in=WIDTH_IN + 0.35 + 0.21 * -(-len(names) // columns))
    axes = figure.subplots()
    _draw_points(axes, points, marks)
    _draw_thumbnails(axes, points, marks, thumbnails[rows], most=_NUM_THUMBNAILS[bool(classes)])
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_color(LIGHT_GREY)
    title = f"{len(rows):,} images by their features: {projection}{colors and ', '}{colors}"
    axes.set_title(title, loc="left", fontsize=9.5)
    if names:
        _draw_legend(figure, names, columns)
    save_png(figure, path)


def cluster_labels(features: npt.NDArray[Any], *, num_clusters: int) -> Labels:
    """Cluster images by k-means on their features at unit length; the largest cluster is 0.

    Args:
        features: ``(M, D)`` float; images with features that are not finite get -1.
        num_clusters: Number of clusters; fewer if there are fewer distinct features.

    Returns:
        ``(M,)`` int64 cluster numbers; equal arguments give equal results.
    """
    rows = np.flatnonzero(np.isfinite(features).all(axis=1))
    labels = np.full(len(features), -1, dtype=np.int64)
    if not len(rows):
        return labels
    directions = _directions(features[rows])
    num_distinct = len(np.unique(directions.round(5), axis=0))
    means = KMeans(min(num_clusters, num_distinct), n_init=_CLUSTER_STARTS, random_state=0)
    clusters = means.fit_predict(directions)
    by_size = np.argsort(-np.bincount(clusters), kind="stable")
    labels[rows] = np.argsort(by_size)[clusters]  # the inverse permutation: rank of each cluster
    return labels


def _directions(features: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    directions: npt.NDArray[np.float64] = features / np.maximum(lengths, np.finfo(np.float64).tiny)
    return directions


def _project(features: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], str]:
    """Project ``(M, D)`` features to the unit square, ``(M, 2)``; also return the method's name."""
    directions = _directions(features)
    if np.ptp(directions, axis=0).max() < _MIN_RANGE:
        return np.full((len(features), 2), 0.5), "all the same"
    num_dims = min(_PCA_DIMS, *directions.shape)
    points = PCA(num_dims, random_state=0).fit_transform(directions)
    if len(points) < _MIN_TSNE_POINTS or num_dims == 1:
        flat = np.zeros((len(points), 2))
        flat[:, : points.shape[1]] = points[:, :2]
        spread = np.ptp(flat, axis=0).max()
        return (flat - (flat.max(axis=0) + flat.min(axis=0)) / 2) / spread + 0.5, "PCA"
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=_TSNE_ITERATIONS)
    flat = tsne.fit_transform(points)
    # Distances across the map have no meaning, so each axis may be stretched.
    return (flat - flat.min(axis=0)) / np.maximum(np.ptp(flat, axis=0), _MIN_RANGE), "t-SNE"


def mark_of(label: int, classes: Sequence[int]) -> Mark:
    """Return the mark of a class: ten colours as circles, then the same colours as triangles.

    A negative label means no class; its mark is grey.
    """
    if label < 0:
        return Mark(GREY, "o")
    shape, color = divmod(classes.index(label), len(_CLASS_COLORS))
    return Mark(_CLASS_COLORS[color], "o^"[shape % 2])


def _names(labels: Labels, classes: Sequence[int], class_names: Sequence[str]) -> dict[Mark, str]:
    """Return the legend's text for each mark; empty if there are no or too many classes."""
    if not 0 < len(classes) <= MAX_NAMED_CLASSES:
        return {}
    names = {}
    for number in classes:
        name = str(class_names[number]) if number < len(class_names) else ""
        names[mark_of(number, classes)] = drawable_name(name, otherwise=f"class {number}")
    return names | ({mark_of(-1, classes): "no label"} if (labels < 0).any() else {})


def _draw_points(axes: Axes, points: npt.NDArray[Any], marks: Sequence[Mark]) -> None:
    size = 3.5 if len(points) > 300 else 5
    for mark in dict.fromkeys(marks):
        x, y = points[[other == mark for other in marks]].T
        axes.plot(x, y, mark.shape, color=mark.color, markersize=size, markeredgewidth=0, alpha=0.8)


def _draw_legend(figure: Figure, names: dict[Mark, str], columns: int) -> None:
    handles = [
        Line2D([], [], linestyle="", marker=mark.shape, color=mark.color, markersize=6)
        for mark in names
    ]
    style: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 8.5}
    # Placeholders first: matplotlib drops labels that start with "_" and parses "$".
    placeholders = [str(number) for number in range(len(names))]
    legend = figure.legend(handles, placeholders, ncols=columns, handletextpad=0.2, **style)
    for text, name in zip(legend.get_texts(), names.values(), strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _draw_thumbnails(
    axes: Axes,
    points: npt.NDArray[Any],
    marks: Sequence[Mark],
    thumbnails: npt.NDArray[np.uint8],
    *,
    most: int,
) -> None:
    """Draw up to ``most`` thumbnails at their points, without overlaps."""
    chosen: list[int] = []
    for row, point in enumerate(points):  # rows are already in random order
        if (np.abs(points[chosen] - point).max(axis=1) > 1.2 * _THUMBNAIL_SIDE).all():
            chosen.append(row)
        if len(chosen) == most:
            break
    half, room_px = _THUMBNAIL_SIDE / 2, _THUMBNAIL_SIDE * WIDTH_IN * DPI
    for row in chosen:
        x, y = points[row]
        box = (x - half, x + half, y - half, y + half)
        show_pixels(axes, thumbnails[row], extent=box, room_px=room_px)
        frame: dict[str, Any] = {"edgecolor": marks[row].color, "linewidth": 1.2, "zorder": 4}
        axes.add_patch(Rectangle((box[0], box[2]), 2 * half, 2 * half, fill=False, **frame))
