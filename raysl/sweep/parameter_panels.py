"""Draw the results of a sweep's trials over each parameter, one panel for each."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from raysl.errors import DataError
from raysl.report.figure import (
    INK,
    WIDTH_IN,
    new_figure,
    save_png,
    style_axes,
    tick_text,
    turned_in,
)
from raysl.report.measure import Measure, measure
from raysl.sweep.config import MetricConfig
from raysl.sweep.parameter import Parameter
from raysl.sweep.summary import visible_range
from raysl.sweep.trial import Trial
from raysl.sweep.trial_marks import BEST, draw_legend, look_of, marker

_COLUMNS = 3
_ROW_IN = 1.75
_JITTER = 0.22  # trials of one slot are spread within it
_GOLDEN = 0.618034  # its multiples are evenly spread for any number of them
_FEW_DECADES = 1.8  # up to which a logarithmic axis has ticks at 2 and 5 too


def draw_parameters(
    path: Path,
    trials: Sequence[Trial],
    metric: MetricConfig,
    parameters: Sequence[Parameter],
    *,
    best: Trial | None,
) -> None:
    """Draw the result of every trial over each parameter, one panel for each.

    Values are side by side, labels best first, with their trials spread horizontally and a bar at
    the median of finished ones; ranges have their own scale. Failed trials are crosses at the
    bottom, and outliers on the bad side are drawn at the edge.

    Args:
        path: PNG to write.
        trials: The trials of the sweep.
        metric: The metric to draw.
        parameters: The parameters to draw, in the order of the panels.
        best: The trial to mark; None marks none.

    Raises:
        DataError: If no trial was measured or no parameter differs.
    """
    values = [t.metric for t in trials if t.metric is not None and t.status != "failed"]
    if not values or not parameters:
        raise DataError("no trial was measured, or all have the same parameters: nothing to draw")
    display = measure(metric.name)
    columns = min(_COLUMNS, len(parameters))
    num_rows = -(-len(parameters) // columns)
    wide_in = (WIDTH_IN - 0.6) / columns - 0.25
    labels_in = max(_turned_in(parameter, wide_in) for parameter in parameters)
    figure = new_figure(height_in=0.5 + num_rows * (_ROW_IN + labels_in))
    grid = figure.subplots(num_rows, columns, sharey=True, squeeze=False)
    low, high = visible_range(values, metric)
    room = (0.08 * (high - low) or 0.01) * display.scale
    limits = low * display.scale - room, high * display.scale + room
    for number, axes in enumerate(grid.flat):
        if number >= len(parameters):
            axes.remove()
            continue
        parameter = _by_median(parameters[number], trials, metric)
        style_axes(axes, title=parameter.name)
        axes.set_ylim(*limits)
        axes.tick_params(axis="x", pad=6)  # below the crosses of failed trials
        axes.yaxis.set_major_formatter(tick_text)
        _set_axis(axes, parameter, turned=_turned_in(parameter, wide_in) > 0)
        _draw_trials(axes, trials, parameter, display, best=best)
    draw_legend(figure, [t for t in trials if _is_shown(t)], best, display, has_lines=False)
    save_png(figure, path)


def _by_median(parameter: Parameter, trials: Sequence[Trial], metric: MetricConfig) -> Parameter:
    """Sort labels by the median of their finished trials, best first; numbers keep their order."""
    if not parameter.is_label:
        return parameter

    def middle(label: Any) -> float:
        values = [
            trial.metric
            for trial in trials
            if trial.params.get(parameter.key) == label
            and trial.status == "finished"
            and trial.metric is not None
        ]
        if not values:
            return math.inf
        return float(np.median(values)) * (-1 if metric.mode == "max" else 1)

    return parameter._replace(values=tuple(sorted(parameter.values, key=middle)))


def _is_shown(trial: Trial) -> bool:
    return trial.status == "failed" or trial.metric is not None


def _turned_in(parameter: Parameter, wide_in: float) -> float:
    """Return the height of labels if they must be vertical, 0 if they fit side by side."""
    return 0.0 if parameter.is_binned else turned_in(parameter.tick_texts(), wide_in)


def _set_axis(axes: Axes, parameter: Parameter, *, turned: bool) -> None:
    if parameter.is_binned:
        if parameter.is_log:
            axes.set_xscale("log")
            axes.minorticks_off()
            decades = math.log10(parameter.edges[-1] / parameter.edges[0])
            subs = (1, 2, 5) if decades < _FEW_DECADES else (1,)
            axes.xaxis.set_major_locator(LogLocator(subs=subs))
        else:
            axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(tick_text)
        return
    slots = range(parameter.num_slots)
    axes.set_xticks(slots, parameter.tick_texts(), parse_math=False)
    axes.set_xlim(-0.5, parameter.num_slots - 0.5)
    if turned:
        axes.tick_params(axis="x", rotation=90)


def _draw_trials(
    axes: Axes,
    trials: Sequence[Trial],
    parameter: Parameter,
    display: Measure,
    *,
    best: Trial | None,
) -> None:
    low, high = axes.get_ylim()
    finished: dict[int, list[float]] = {}
    for trial in trials:
        if parameter.key not in trial.params or not _is_shown(trial):
            continue
        value = trial.params[parameter.key]
        x, y = float(value) if parameter.is_binned else _spread(trial, parameter.slot(value)), low
        look = look_of(trial, best)
        if trial.status != "failed" and trial.metric is not None:
            y = display.scale * trial.metric
            if trial.status == "finished" and not parameter.is_binned:
                finished.setdefault(parameter.slot(value), []).append(y)
        order = 5 if look is BEST else 3
        axes.plot(x, min(max(y, low), high), **marker(look), clip_on=False, zorder=order)
    for slot, ys in finished.items():
        axes.hlines(np.median(ys), slot - 0.36, slot + 0.36, color=INK, linewidth=1.4, zorder=4)


def _spread(trial: Trial, slot: int) -> float:
    """Return a trial's horizontal position within a slot, with a fixed jitter."""
    return slot + _JITTER * (2 * (trial.number * _GOLDEN % 1) - 1)
