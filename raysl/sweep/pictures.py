"""Draw the pictures of a sweep: learning curves, importance of parameters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from raysl.errors import DataError
from raysl.report.figure import (
    BLUE,
    INK,
    drawable_name,
    new_figure,
    save_png,
    style_axes,
    tick_text,
)
from raysl.report.measure import measure, short_names
from raysl.sweep.config import MetricConfig
from raysl.sweep.heat_map import draw_heat_map, heat_axes
from raysl.sweep.parameter_panels import draw_parameters
from raysl.sweep.summary import visible_range
from raysl.sweep.trial import Trial
from raysl.sweep.trial_marks import BEST, LOOKS, Look, bright, draw_legend, look_of, marker

__all__ = [
    "draw_heat_map",
    "draw_importance",
    "draw_parameters",
    "draw_trial_curves",
    "heat_axes",
]

_BAR_IN = 0.27


def draw_trial_curves(
    path: Path, trials: Sequence[Trial], metric: MetricConfig, *, best: Trial | None
) -> None:
    """Draw the metric of every trial over its epochs.

    Finished trials are coloured by their final value, brighter is better; stopped ones are grey and
    dashed, failed ones end in a cross; the best one is on top.

    Args:
        path: PNG to write.
        trials: The trials of the sweep.
        metric: The metric to draw.
        best: The trial to mark; None marks none.

    Raises:
        DataError: If no trial was measured.
    """
    measured = [trial for trial in trials if trial.curve]
    if not measured:
        raise DataError("no trial was measured: there is no curve to draw")
    display = measure(metric.name)
    figure = new_figure(height_in=3.6)
    axes = figure.subplots()
    style_axes(axes, title="")
    ends = [trial.curve[-1][1] for trial in measured if trial.status == "finished"]
    low, high = visible_range(ends, metric) if ends else (0.0, 1.0)
    bad, good = (low, high) if metric.mode == "max" else (high, low)
    for trial in measured:
        look = look_of(trial, best)
        color = look.color
        if look is LOOKS["finished"]:
            end = trial.curve[-1][1]
            color = bright((end - bad) / (good - bad) if good != bad else 1.0)
        _draw_curve(axes, trial, look, color=color, scale=display.scale)
    axes.set_xlabel("epoch", fontsize=9, color=INK)
    axes.set_xlim(left=0)
    axes.margins(x=0.05)
    axes.yaxis.set_major_formatter(tick_text)
    axes.xaxis.set_major_formatter(tick_text)
    draw_legend(figure, measured, best, display, has_lines=True)
    save_png(figure, path)


def _draw_curve(axes: Axes, trial: Trial, look: Look, *, color: Any, scale: float) -> None:
    x, y = np.array(trial.curve).T
    y = y * scale
    is_finished = trial.status == "finished"
    line: dict[str, Any] = {"color": color, "linestyle": look.line, "linewidth": 1.2}
    line["zorder"] = 3 if is_finished else 2
    if look is BEST:
        line |= {"linewidth": 2.6, "zorder": 4}
    axes.plot(x, y, **line)
    if look is BEST or not is_finished or len(x) == 1:
        axes.plot(x[-1], y[-1], **marker(look), zorder=5)


def draw_importance(path: Path, importance: Mapping[str, float]) -> None:
    """Draw each parameter's importance as a bar, largest first.

    Args:
        path: PNG to write.
        importance: Each parameter's share, from :class:`raysl.sweep.summary.Summary`.

    Raises:
        DataError: If ``importance`` is empty.
    """
    if not importance:
        raise DataError("no parameter's importance is known: there is nothing to draw")
    names = short_names(importance)
    figure = new_figure(height_in=0.75 + _BAR_IN * len(importance))
    axes = figure.subplots()
    style_axes(axes, title="Share of the explained differences between trials, %", grid="x")
    for row, share in enumerate(importance.values()):
        axes.barh(row, 100 * share, 0.62, color=BLUE)
        axes.text(100 * share + 1, row, f"{100 * share:.0f}", va="center", fontsize=8, color=INK)
    texts = [drawable_name(names[key], otherwise=f"parameter {n}") for n, key in enumerate(names)]
    axes.set_yticks(range(len(texts)), texts, fontsize=8.5, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlim=(0, 107), xticks=range(0, 101, 20))
    save_png(figure, path)
