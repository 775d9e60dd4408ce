"""`raysl benchmark plan`: measure and draw memory and start time of the order of images."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from rich.table import Table

from raysl.benchmark.arguments import add_benchmark, add_json, wholes
from raysl.benchmark.plan import KINDS, measure_in_own_process
from raysl.errors import DataError
from raysl.report.figure import BLUE, INK, ORANGE, new_figure, save_png, style_axes
from raysl.report.terminal import console, say

_MIB = 1 << 20


class _Line(NamedTuple):
    kind: str
    label: str
    color: str


_LINES = (
    _Line("shards", "shards, row groups of 100", BLUE),
    _Line("folder", "one group (image folder)", ORANGE),
)
_PANELS = (
    ("peak_bytes", "Peak memory of a plan in use, MiB", 1 / _MIB),
    ("start_s", "Time to the first item, s", 1.0),
)
_COLUMNS = ("images", "plan size", "build", "first item", "next item", "random item")


def add_arguments(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the arguments."""
    summary = "measure memory and start time of the plan (the order of images) over their number"
    parser = add_benchmark(kinds, "plan", summary)
    parser.add_argument(
        "--images",
        type=wholes,
        default=[10**6, 10**8, 10**9],
        help="numbers of images (1e6,1e8,1e9)",
    )
    parser.add_argument("--figure", type=Path, help="PNG for a figure of the results")
    add_json(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a plan of each kind and size; print a table, and draw a figure if requested."""
    plans = []
    for kind in KINDS:
        for num_images in arguments.images:
            say(f"measuring the plan of {num_images:,} images in {KINDS[kind]}")
            plans.append(measure_in_own_process(kind, num_images))
    console().print(_table(plans))
    if arguments.figure is not None:
        draw_plan_scale(arguments.figure, plans)
        say(f"drawn: {arguments.figure}")
    return {"plans": plans}


def _table(plans: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="The order of images in a run of 100 epochs",
        title_justify="left",
        caption="; ".join(f"{kind}: {text}" for kind, text in KINDS.items()),
        caption_justify="left",
    )
    table.add_column("source")
    for column in (*_COLUMNS, "peak memory"):
        table.add_column(column, justify="right")
    for plan in plans:
        cells = [plan["kind"], f"{plan['num_images']:.0e}".replace("e+0", "e")]
        if plan["problem"] is not None:
            table.add_row(*cells, plan["problem"])
            continue
        table.add_row(
            *cells,
            _bytes(plan["plan_bytes"]),
            f"{plan['build_s']:.3f} s",
            f"{plan['first_item_s']:.3f} s",
            f"{plan['item_in_order_ms']:.3f} ms",
            f"{plan['item_at_random_ms']:.2f} ms",
            _bytes(plan["peak_bytes"]),
        )
    return table


def _bytes(number: float) -> str:
    return f"{number / 1024:,.1f} KiB" if number < _MIB else f"{number / _MIB:,.1f} MiB"


def draw_plan_scale(path: Path, plans: Sequence[Mapping[str, Any]]) -> None:
    """Draw peak memory and start time (building and first item) over the number of images.

    Args:
        path: PNG to write.
        plans: Fields of :class:`raysl.benchmark.plan.PlanCost`; plans without measurements are left
            out.

    Raises:
        DataError: If no plan was measured.
    """
    measured = [
        {**plan, "start_s": plan["build_s"] + plan["first_item_s"]}
        for plan in plans
        if plan["peak_bytes"] is not None
    ]
    if not measured:
        raise DataError("no plan could be measured: there is nothing to draw")
    figure = new_figure(height_in=2.9)
    for axes, (key, title, scale) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        _draw(axes, measured, key=key, title=title, scale=scale)
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
