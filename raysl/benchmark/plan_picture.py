"""Draw memory and start time of the plan over the number of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from raysl.errors import DataError
from raysl.report.figure import BLUE, INK, ORANGE, new_figure, save_png, style_axes


class _Line(NamedTuple):
    kind: str
    label: str
    color: str


_LINES = (
    _Line("shards", "shards, row groups of 100", BLUE),
    _Line("folder", "one group (image folder)", ORANGE),
)
_PANELS = (
    ("peak_bytes", "Peak memory of a plan in use, MiB", 1 / 2**20),
    ("start_s", "Time to the first item, s", 1.0),
)


def draw_plan_scale(path: Path, plans: Sequence[Mapping[str, Any]]) -> None:
    """Draw peak memory and start time (building and first item) over the number of images.

    Args:
        path: PNG to write.
        plans: Records like :class:`raysl.benchmark.plan.PlanCost`; plans that did not fit into
            memory have None and are left out.

    Raises:
        DataError: If no plan fitted.
    """
    known = [
        {**plan, "start_s": plan["build_s"] + plan["first_item_s"]}
        for plan in plans
        if plan["peak_bytes"] is not None
    ]
    if not known:
        raise DataError("no plan could be measured: there is nothing to draw")
    figure = new_figure(height_in=2.9)
    for axes, (key, title, scale) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        _draw(axes, known, key=key, title=title, scale=scale)
    figure.supxlabel("images of the source", fontsize=9, color=INK)
    save_png(figure, path)


def _draw(
    axes: Axes, plans: Sequence[Mapping[str, Any]], *, key: str, title: str, scale: float
) -> None:
    style_axes(axes, title=title)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    for line in _LINES:
        points = sorted((p["num_images"], p[key] * scale) for p in plans if p["kind"] == line.kind)
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=line.color, marker="o", markersize=4, label=line.label)
    axes.margins(x=0.08, y=0.2)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)
