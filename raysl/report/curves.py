"""Draw the curves of a run: each metric over the optimizer step, in a panel of its own."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from raysl.errors import DataError
from raysl.report.figure import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    RED,
    new_figure,
    save_png,
    style_axes,
    tick_text,
)
from raysl.report.measure import measure

Record = Mapping[str, Any]

_SMOOTH_FROM = 60  # noisy curves of at least this many values get a running mean
_WINDOWS = 30  # the window of the running mean is the number of values over this


class _Panel(NamedTuple):
    """A curve to draw."""

    key: str  # of the metric
    color: str = BLUE
    from_zero: bool = False  # whether the axis starts at 0
    is_noisy: bool = False  # whether to draw a running mean


_LEARNING = (
    _Panel("train/loss", is_noisy=True),
    _Panel("eval/knn_top1", ORANGE),
)
_LABEL_FREE = (
    _Panel("eval/rankme", ORANGE, from_zero=True),
    _Panel("eval/alpha_req", ORANGE),
    _Panel("eval/alignment", ORANGE),
    _Panel("eval/uniformity", ORANGE),
)
_HEALTH = (
    _Panel("train/feature_std", from_zero=True),
    _Panel("train/effective_rank", from_zero=True),
    _Panel("train/lr", from_zero=True),
    _Panel("train/grad_norm", from_zero=True, is_noisy=True),
    _Panel("train/images_per_s", GREEN, from_zero=True, is_noisy=True),
    _Panel("data/wait_share", GREEN, from_zero=True, is_noisy=True),
)
_NOT_CURVES = ("final", "time")


def draw_curves(path: Path, records: list[dict[str, Any]]) -> None:
    """Draw each metric that has values over the optimizer step, in a panel of its own.

    Args:
        path: PNG to write.
        records: Lines of ``metrics.jsonl``; any key but ``step`` may be missing. A cross at the
            bottom of the panel marks values that are not finite.

    Raises:
        DataError: If no metric has a finite value.
    """
    panels = [p for p in _panels(records) if np.isfinite(_curve(records, p)[1]).any()]
    if not panels:
        raise DataError("the metrics hold no finite number to draw")
    num_rows = -(-len(panels) // 2)
    figure = new_figure(height_in=0.35 + 1.75 * num_rows)
    grid = figure.subplots(num_rows, 2, sharex=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, records)
    if len(panels) % 2:
        grid[-1, 1].remove()
        if num_rows > 1:
            grid[-2, 1].tick_params(labelbottom=True)
    figure.supxlabel(_step_label(records), fontsize=9, color=INK)
    save_png(figure, path)


def _panels(records: Sequence[Record]) -> list[_Panel]:
    """List the panels; those of the method's own metrics follow the ones about learning."""
    known = {panel.key for panel in (*_LEARNING, *_LABEL_FREE, *_HEALTH)} | {
        "step",
        "time",
        "train/epoch",
    }
    others = dict.fromkeys(key for record in records for key in record if key not in known)
    of_method = [
        _Panel(key, is_noisy=True) for key in others if key.partition("/")[0] not in _NOT_CURVES
    ]
    return [*_LEARNING, *_LABEL_FREE, *of_method, *_HEALTH]


def _curve(records: Sequence[Record], panel: _Panel) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the steps that have the metric, and its values in the panel's unit."""
    pairs = [(record["step"], record[panel.key]) for record in records if panel.key in record]
    pairs = [(step, value) for step, value in pairs if isinstance(value, (int, float))]
    curve = np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)
    return curve[:, 0], curve[:, 1] * measure(panel.key).scale


def _draw_panel(axes: Axes, panel: _Panel, records: Sequence[Record]) -> None:
    steps, values = _curve(records, panel)
    finite = np.isfinite(values)
    x, y = steps[finite], values[finite]
    style_axes(axes, title=measure(panel.key).title)
    if panel.is_noisy and len(y) >= _SMOOTH_FROM:
        axes.plot(x, y, color=panel.color, linewidth=0.8, alpha=0.35)
        axes.plot(x, _running_mean(y, len(y) // _WINDOWS), color=panel.color, linewidth=1.6)
    else:
        marker = "o" if len(y) <= _SMOOTH_FROM // 2 else ""
        axes.plot(x, y, color=panel.color, linewidth=1.6, marker=marker, markersize=3)
    axes.margins(y=0.15)
    if panel.from_zero:
        axes.set_ylim(bottom=0, top=1.08 * y.max() if y.max() > 0 else 1)
    if panel.key == "eval/knn_top1":
        _draw_references(axes, records)
    not_finite = steps[~finite]
    if len(not_finite):
        bottom = axes.get_xaxis_transform()  # y is relative to the axes
        zeros = np.zeros(len(not_finite))
        axes.plot(not_finite, zeros, "x", color=RED, transform=bottom, clip_on=False)
        axes.set_title("x: not finite", loc="right", fontsize=8, color=RED)
    axes.yaxis.set_major_formatter(tick_text)
    axes.xaxis.set_major_formatter(tick_text)
    axes.locator_params(axis="both", nbins=5)


def _draw_references(axes: Axes, records: Sequence[Record]) -> None:
    """Draw the accuracies of the untrained network and of plain pixels, if they were measured."""
    for key, text in (("untrained", "before training"), ("pixels", "bare pixels")):
        values = [r[f"final/{key}_knn_top1"] for r in records if f"final/{key}_knn_top1" in r]
        if values:
            axes.axhline(100 * values[-1], color=GREY, linewidth=1, linestyle="--")
            right = axes.get_yaxis_transform()  # x is relative to the axes
            style: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 7.5, "color": GREY}
            axes.text(1, 100 * values[-1], text, transform=right, **style)


def _running_mean(values: npt.NDArray[Any], window: int) -> npt.NDArray[Any]:
    """Return a centred running mean; the window is shorter at both ends."""
    kernel = np.ones(2 * (window // 2) + 1)
    sums = np.convolve(values, kernel, mode="same")
    result: npt.NDArray[Any] = sums / np.convolve(np.ones_like(values), kernel, mode="same")
    return result


def _step_label(records: Sequence[Record]) -> str:
    for record in reversed(records):
        epoch = record.get("train/epoch", math.nan)
        if math.isfinite(epoch) and epoch > 0:
            return f"optimizer step ({record['step']:,} steps are {epoch:,.4g} epochs)"
    return "optimizer step"
