"""Draw accuracy over the number of labels that a protocol used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.ticker import FuncFormatter, NullFormatter

from raysl.errors import DataError
from raysl.report.figure import (
    BLUE,
    GREEN,
    INK,
    NARROW_IN,
    ORANGE,
    new_figure,
    save_png,
    style_axes,
)

_LINES = {
    "Linear, frozen": (BLUE, "o-"),
    "Fine-tuned": (ORANGE, "s-"),
    "Nearest neighbours": (GREEN, "^"),
}


class AccuracyPoint(NamedTuple):
    """The accuracy of a protocol with a number of labels."""

    kind: str
    """Name of its line in the picture."""
    num_labels: int
    mean: float
    """Accuracy in [0, 1]."""
    deviation: float
    """Standard deviation over seeds or draws."""


def accuracy_points(
    protocols: Mapping[str, Mapping[str, Any]], *, num_train: int, num_classes: int
) -> list[AccuracyPoint]:
    """Return the protocols with a known number of labels, in ascending order.

    Args:
        protocols: Section ``protocols`` of ``evaluation.json``. The number of labels is
            ``num_labels`` in a protocol's ``settings`` or ``facts``, or follows from
            ``labels_per_class`` or ``label_fraction`` in its settings. ``by_labels``,
            ``{labels: {mean, deviation}}``, gives several points. Without any of these, semi_1 uses
            1 % of the labels, semi_10 10 %, and other protocols all.
        num_train: Number of labelled training images.
        num_classes: Number of classes among them.
    """
    points = []
    for name, measured in protocols.items():
        kind = _kind(name)
        if kind is None:
            continue
        several = measured.get("by_labels")
        if isinstance(several, Mapping):
            for labels, each in several.items():
                points.append(_point(kind, int(labels), each))
            continue
        facts = next(iter(measured.get("facts") or []), None) or {}  # of the first seed
        settings = {"num_labels": facts.get("num_labels"), **(measured.get("settings") or {})}
        labels = _num_labels(name, settings, num_train=num_train, num_classes=num_classes)
        points.append(_point(kind, labels, measured))
    return sorted(
        (each for each in points if each.num_labels > 0), key=lambda each: each.num_labels
    )


def _point(kind: str, labels: int, measured: Mapping[str, Any]) -> AccuracyPoint:
    return AccuracyPoint(
        kind, labels, float(measured["mean"]), float(measured.get("deviation") or 0.0)
    )


def _kind(name: str) -> str | None:
    if name.startswith(("few_shot", "linear")):
        return "Linear, frozen"
    if name.startswith(("finetune", "semi_")):
        return "Fine-tuned"
    return "Nearest neighbours" if name.startswith("knn") else None


def _num_labels(name: str, settings: Mapping[str, Any], *, num_train: int, num_classes: int) -> int:
    if settings.get("num_labels"):
        return int(settings["num_labels"])
    if settings.get("labels_per_class"):
        return int(settings["labels_per_class"]) * num_classes
    fraction = settings.get("label_fraction")
    if fraction is None and name.startswith("semi_"):
        fraction = float(name.removeprefix("semi_")) / 100
    return round(float(fraction) * num_train) if fraction else num_train


def draw_by_labels(path: Path, points: Sequence[AccuracyPoint]) -> None:
    """Draw accuracy over the logarithm of the number of labels, one line for each kind.

    Args:
        path: PNG to write.
        points: The result of :func:`accuracy_points`.

    Raises:
        DataError: If all points have the same number of labels.
    """
    if len({point.num_labels for point in points}) < 2:
        raise DataError("all accuracies have the same number of labels: there is no curve to draw")
    figure = new_figure(width_in=NARROW_IN, height_in=3.6)
    axes = figure.subplots()
    style_axes(axes, title="Top-1 accuracy, %")
    axes.tick_params(labelsize=9)
    for kind, (color, style) in _LINES.items():
        line = [point for point in points if point.kind == kind]
        if not line:
            continue
        axes.errorbar(
            [point.num_labels for point in line],
            [100 * point.mean for point in line],
            yerr=[100 * point.deviation for point in line],
            fmt=style,
            color=color,
            ecolor=INK,
            elinewidth=1,
            capsize=3,
            markersize=6,
            linewidth=1.6,
            label=kind,
        )
        last = line[-1]
        for point in line:
            axes.annotate(
                f"{100 * point.mean:.1f}",
                (point.num_labels, 100 * point.mean),
                xytext=(7, -11 if point is not last or kind == "Nearest neighbours" else 6),
                textcoords="offset points",
                fontsize=9.5,
                color=INK,
            )
    axes.set_xscale("log")
    ticks = sorted({point.num_labels for point in points})
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel("labelled images used", fontsize=9.5, color=INK)
    legend: dict[str, Any] = {"loc": "outside upper left", "ncols": 3, "frameon": False}
    figure.legend(fontsize=9.5, columnspacing=1.2, handletextpad=0.4, **legend)
    save_png(figure, path)
