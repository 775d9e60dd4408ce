"""Draw heat maps of a sweep: its metric over two parameters, in panels by a third."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from raysl.errors import DataError
from raysl.report.figure import (
    GREY,
    INK,
    RED,
    WIDTH_IN,
    legend_above,
    new_figure,
    save_png,
    style_axes,
    turned_in,
)
from raysl.report.measure import Measure, measure
from raysl.sweep.config import MetricConfig
from raysl.sweep.parameter import Parameter
from raysl.sweep.summary import visible_range
from raysl.sweep.trial import Trial

_Y, _X, _PANEL = "temperature", "global_batch_size", "queue_length"
_CELLS_PER_TRIAL = 3  # with more cells, most would be empty
_CELL_IN = 0.46  # narrowest cell with room for its number
_WIDEST_IN = 1.0  # widest cell
_ROW_IN = 0.4
_HEAD_IN = 0.3  # title of a row of panels
_GAP_IN = 0.15
_AROUND_IN = 1.6  # label, ticks and colour bar beside the cells
_OUTSIDE_IN = 0.9  # title, and the parameter's name below
_TICKS_IN = 0.15  # height of horizontal tick labels
_TITLE_LETTER_IN = 0.075
_MOST_COLUMNS = 4
_LUMINANCE = (0.2126, 0.7152, 0.0722)  # weights of red, green and blue (ITU-R BT.709)
_DARK = 0.5  # luminance below which white letters are more readable
_EMPTY = "#F0F0F0"


class HeatAxes(NamedTuple):
    """The parameters of a heat map."""

    x: Parameter
    y: Parameter
    panel: Parameter | None


class _Cell(NamedTuple):
    """The results of the trials in a cell."""

    value: float | None = None
    is_partial: bool = False
    """Whether none of them finished."""
    has_failed: bool = False
    """Whether all of them failed."""


_UNKNOWN = _Cell()
_ONE_PANEL = Parameter("", "", values=(None,))
_Cells = dict[tuple[int, int, int], _Cell]  # by panel, row and column


def heat_axes(
    trials: Sequence[Trial], parameters: Sequence[Parameter], importance: Mapping[str, float]
) -> HeatAxes | None:
    """Choose the axes of a sweep's heat map; None for fewer than two parameters.

    The axes are temperature over batch size, in panels by queue length, if the sweep has these.
    Otherwise they are the two most important parameters, in the space's order, with the third in
    panels unless most cells would be empty. Parameters that only some trials have are left out.
    """
    shared = [p for p in parameters if all(p.key in trial.params for trial in trials)]
    by_name = {parameter.key.rpartition(".")[2]: parameter for parameter in shared}
    ordered = sorted(shared, key=lambda parameter: -importance.get(parameter.key, 0.0))
    if len(ordered) < 2:
        return None
    if _X in by_name and _Y in by_name:
        x, y = by_name[_X], by_name[_Y]
    else:
        y, x = (parameter for parameter in shared if parameter in ordered[:2])
    others = [parameter for parameter in ordered if parameter not in (x, y)]
    panel = by_name.get(_PANEL)
    panel = panel if panel in others else next(iter(others), None)
    if panel is not None:
        cells = x.num_slots * y.num_slots * panel.num_slots
        panel = panel if cells <= _CELLS_PER_TRIAL * len(trials) else None
    return HeatAxes(x, y, panel)


def draw_heat_map(
    path: Path, trials: Sequence[Trial], metric: MetricConfig, axes: HeatAxes
) -> None:
    """Draw the metric over two parameters, with a panel for each value of a third.

    A cell is the mean of its finished trials; if none finished, the mean of the others' last
    values, hatched. It contains its number, the best cell is framed, and a cell with only failed
    trials has a cross. Trials that lack one of the parameters are left out.

    Args:
        path: PNG to write.
        trials: The trials of the sweep.
        metric: The metric to draw.
        axes: The parameters of the axes and panels.

    Raises:
        DataError: If no trial with these parameters was measured.
    """
    panel = axes.panel or _ONE_PANEL
    cells = _cells(trials, axes, panel)
    if all(cell.value is None for cell in cells.values()):
        raise DataError(
            f"no trial with {axes.x.key} and {axes.y.key} was measured: there is no map to draw"
        )
    best = _best(cells, metric)
    display = measure(metric.name)
    colors, extend_side = _colors([cell.value for cell in cells.values()], display, metric)
    layout = _layout(axes, panel.num_slots)
    figure, grid = _panels(layout, panel.num_slots)
    for number, (subplot, title) in enumerate(zip(grid, _titles(panel, layout), strict=True)):
        style_axes(subplot, title=title)
        subplot.grid(False)
        _set_ticks(subplot, axes)
        for row, column in product(range(axes.y.num_slots), range(axes.x.num_slots)):
            cell = cells.get((number, row, column), _UNKNOWN)
            _draw_cell(subplot, row, column, cell, colors, display)
        if best[0] == number:
            _draw_frame(subplot, row=best[1], column=best[2])
    by = f", by {panel.name}" if axes.panel else ""
    legend_above(figure, _legend(cells), title=f"{display.title}{by}")
    figure.supxlabel(axes.x.name, fontsize=9, color=INK)
    figure.supylabel(axes.y.name, fontsize=9, color=INK)
    bar = figure.colorbar(colors, ax=grid, extend=extend_side, aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=7.5, colors=INK, length=2)
    bar.outline.set_visible(False)
    save_png(figure, path)


def _cells(trials: Sequence[Trial], axes: HeatAxes, panel: Parameter) -> _Cells:
    cells: dict[tuple[int, int, int], list[Trial]] = {}
    for trial in trials:
        if all(p.key in trial.params for p in (axes.x, axes.y, panel) if p.key):
            panel_index, row, column = (
                p.slot(trial.params.get(p.key)) for p in (panel, axes.y, axes.x)
            )
            cells.setdefault((panel_index, row, column), []).append(trial)
    return {key: _cell(group) for key, group in cells.items()}


def _cell(trials: Sequence[Trial]) -> _Cell:
    finished = [t.metric for t in trials if t.status == "finished" and t.metric is not None]
    if finished:
        return _Cell(float(np.mean(finished)))
    unfinished = [t.metric for t in trials if t.status != "failed" and t.metric is not None]
    if unfinished:
        return _Cell(float(np.mean(unfinished)), is_partial=True)
    return _Cell(has_failed=all(trial.status == "failed" for trial in trials))


def _best(cells: _Cells, metric: MetricConfig) -> tuple[int, int, int]:
    """Return the position of the best cell, among those with finished trials if there are any."""
    measured = {key: cell for key, cell in cells.items() if cell.value is not None}
    candidates = {k: cell for k, cell in measured.items() if not cell.is_partial} or measured
    sign = 1 if metric.mode == "max" else -1
    return max(candidates, key=lambda key: sign * (candidates[key].value or 0.0))


def _colors(
    values: Sequence[float | None], display: Measure, metric: MetricConfig
) -> tuple[ScalarMappable, str]:
    """Return the colours of values in the title's unit, and matplotlib's ``extend`` for outliers.

    Brighter is better.
    """
    measured = [value for value in values if value is not None]
    low, high = visible_range(measured, metric)
    extend_side = "min" if min(measured) < low else "max" if max(measured) > high else "neither"
    if low == high:
        low, high = low - 0.5 / display.scale, high + 0.5 / display.scale
    name = "viridis" if metric.mode == "max" else "viridis_r"
    return ScalarMappable(Normalize(display.scale * low, display.scale * high), name), extend_side


class _Layout(NamedTuple):
    """The arrangement of panels."""

    columns: int
    num_rows: int
    width_in: float
    height_in: float
    is_turned: bool
    """Whether the labels below must be vertical."""

    @property
    def panel_in(self) -> float:
        """Width of a panel."""
        return (self.width_in - _AROUND_IN) / self.columns - _GAP_IN


def _layout(axes: HeatAxes, num_panels: int) -> _Layout:
    """Return the number of panels side by side, and the size that cells and labels need."""
    fit = int((WIDTH_IN - _AROUND_IN) // (_CELL_IN * axes.x.num_slots + _GAP_IN))
    num_rows = -(-num_panels // max(1, min(fit, _MOST_COLUMNS)))
    columns = -(-num_panels // num_rows)  # rows of equal length
    wide = min(columns * (_WIDEST_IN * axes.x.num_slots + _GAP_IN) + _AROUND_IN, WIDTH_IN)
    turned = turned_in(axes.x.tick_texts(), (wide - _AROUND_IN) / columns - _GAP_IN)
    high = num_rows * (_ROW_IN * axes.y.num_slots + (_HEAD_IN if axes.panel else 0.0))
    high += _OUTSIDE_IN + max(turned, _TICKS_IN)
    return _Layout(columns, num_rows, wide, high, turned > 0)


def _panels(layout: _Layout, num_panels: int) -> tuple[Figure, list[Axes]]:
    figure = new_figure(width_in=layout.width_in, height_in=layout.height_in)
    grid = figure.subplots(layout.num_rows, layout.columns, squeeze=False, sharex=True, sharey=True)
    panels: list[Axes] = list(grid.flat)
    for number, subplot in enumerate(panels):
        if number >= num_panels:
            subplot.remove()
        elif number + layout.columns >= num_panels:
            subplot.tick_params(labelbottom=True)
        if layout.is_turned:
            subplot.tick_params(axis="x", rotation=90)
    return figure, panels[:num_panels]


def _titles(panel: Parameter, layout: _Layout) -> list[str]:
    """Return the title of each panel: its value, with the parameter's name if it fits."""
    if panel is _ONE_PANEL:
        return [""]
    named = [f"{panel.name} {text}" for text in panel.drawable_texts()]
    longest_in = _TITLE_LETTER_IN * max(map(len, named))
    return named if longest_in <= layout.panel_in else panel.drawable_texts()


def _set_ticks(subplot: Axes, axes: HeatAxes) -> None:
    for parameter, set_ticks in ((axes.x, subplot.set_xticks), (axes.y, subplot.set_yticks)):
        texts = parameter.tick_texts()
        shift = 0.5 if parameter.is_binned else 0.0  # the numbers of bins are at their edges
        places = [number - shift for number in range(len(texts))]
        set_ticks(places, texts, fontsize=8, parse_math=False)
    subplot.set(xlim=(-0.5, axes.x.num_slots - 0.5), ylim=(-0.5, axes.y.num_slots - 0.5))
    if axes.y.is_label:
        subplot.invert_yaxis()
    subplot.spines["bottom"].set_visible(False)


def _draw_cell(
    subplot: Axes, row: int, column: int, cell: _Cell, colors: ScalarMappable, display: Measure
) -> None:
    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5}
    if cell.value is None:
        subplot.add_patch(_square(row, column, facecolor=_EMPTY, edgecolor="white"))
        if cell.has_failed:
            subplot.plot(column, row, "x", color=RED, markersize=5)
        return
    color = colors.to_rgba(np.array([display.scale * cell.value]))[0]
    ink = "white" if np.dot(color[:3], _LUMINANCE) < _DARK else INK
    subplot.add_patch(_square(row, column, facecolor=color, edgecolor="white"))
    if cell.is_partial:
        lines: dict[str, Any] = {"edgecolor": ink, "alpha": 0.35, "linewidth": 0}
        subplot.add_patch(_square(row, column, facecolor="none", hatch="////", **lines))
        place["bbox"] = {"facecolor": color, "edgecolor": "none", "pad": 1.2}
    subplot.text(column, row, display.text(cell.value), color=ink, **place)


def _legend(cells: _Cells) -> list[Artist]:
    """Return legend entries for the marks in use."""
    handles: list[Artist] = [
        Patch(facecolor="none", edgecolor=RED, linewidth=2, label="best mean"),
    ]
    if any(cell.is_partial for cell in cells.values()):
        lines: dict[str, Any] = {"facecolor": _EMPTY, "edgecolor": GREY, "linewidth": 0}
        handles.append(Patch(hatch="////", label="none finished", **lines))
    if any(cell.has_failed for cell in cells.values()):
        cross: dict[str, Any] = {"marker": "x", "color": RED, "linestyle": "", "markersize": 5}
        handles.append(Line2D([], [], label="all failed", **cross))
    return handles


def _square(row: int, column: int, **look: Any) -> Rectangle:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, **look)


def _draw_frame(subplot: Axes, *, row: int, column: int) -> None:
    subplot.add_patch(
        _square(
            row, column, facecolor="none", edgecolor=RED, linewidth=2.5, zorder=5, clip_on=False
        )
    )
