"""Draw accuracy over each label-free measure, to show how well the measure predicts it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from raysl.errors import DataError
from raysl.report.feature_map import mark_of
from raysl.report.figure import INK, new_figure, save_png, style_axes

_COLUMNS = 3
_ROW_IN = 2.4
_SHOWN = {
    "rankme": "RankMe",
    "alpha_req": "alpha-ReQ",
    "alignment": "Alignment",
    "uniformity": "Uniformity",
    "feature_std": "Spread of features",
    "knn_top1": "kNN (with labels), %",
}


class Point(Protocol):
    """The interface of an encoder to draw."""

    @property
    def method(self) -> str:
        """Sets the colour."""

    @property
    def measures(self) -> Mapping[str, float]:
        """The values, by the measure's name."""

    @property
    def linear_top1(self) -> float:
        """Accuracy in [0, 1]."""


class Relation(Protocol):
    """The rank correlation of a measure with accuracy."""

    @property
    def measure(self) -> str:
        """Its name."""

    @property
    def spearman(self) -> float:
        """Spearman's coefficient, signed so that 1 means a perfect prediction."""

    @property
    def spearman_interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""


def draw_label_free(
    path: Path,
    points: Sequence[Point],
    relations: Sequence[Relation],
    *,
    direction: Mapping[str, str],
    is_untrained: Callable[[Point], bool],
) -> None:
    """Draw accuracy over each measure, one point for each encoder, with the rank correlation.

    Args:
        path: PNG to write.
        points: The encoders; untrained ones are crosses.
        relations: One panel each, in this order.
        direction: The direction of each measure that predicts better accuracy, by name.
        is_untrained: Whether an encoder has random weights.

    Raises:
        DataError: If there is nothing to draw.
    """
    if not points or not relations:
        raise DataError("no encoders or no measures: there is nothing to draw")
    methods = sorted({point.method for point in points if not is_untrained(point)})
    classes = list(range(len(methods)))
    marks = {name: mark_of(number, classes) for number, name in enumerate(methods)}
    num_rows = -(-len(relations) // _COLUMNS)
    columns = 6
    legend_in = 0.2 * -(-(len(methods) + 1) // columns) + 0.15
    figure = new_figure(width_in=8.0, height_in=_ROW_IN * num_rows + legend_in)
    grid = figure.subplots(num_rows, _COLUMNS, squeeze=False, sharey=True)
    for axes, relation in zip(grid.flat, relations, strict=False):
        _draw_panel(axes, relation, direction.get(relation.measure, ""))
        for point in points:
            value = point.measures.get(relation.measure)
            if value is None:
                continue
            shown = 100 * value if relation.measure.endswith("top1") else value
            cross = is_untrained(point)
            shape, color = ("x", INK) if cross else (marks[point.method][1], marks[point.method][0])
            axes.plot(shown, 100 * point.linear_top1, shape, color=color, markersize=5, alpha=0.9)
        axes.margins(x=0.08, y=0.08)
    for axes in list(grid.flat)[len(relations) :]:
        axes.remove()
    figure.supylabel("linear accuracy, %", fontsize=9, color=INK)
    handles = [
        Line2D([], [], linestyle="", marker=mark[1], color=mark[0], markersize=5, label=name)
        for name, mark in marks.items()
    ]
    if any(is_untrained(point) for point in points):
        style: dict[str, Any] = {"marker": "x", "color": INK, "markersize": 5}
        handles.append(Line2D([], [], linestyle="", label="before training", **style))
    place: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 8}
    figure.legend(handles=handles, ncols=columns, handletextpad=0.2, **place)
    save_png(figure, path)


def _draw_panel(axes: Axes, relation: Relation, direction: str) -> None:
    low, high = relation.spearman_interval
    name = _SHOWN.get(relation.measure, relation.measure)
    style_axes(axes, title=f"{name}\nrho {relation.spearman:+.2f}  [{low:+.2f}, {high:+.2f}]")
    axes.title.set_fontsize(8.5)
    axes.set_xlabel(direction, fontsize=7.5, color=INK, labelpad=1)
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="both", nbins=5)
