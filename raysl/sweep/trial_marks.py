"""The marks of trials in the pictures of a sweep, and their legend."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from raysl.report.figure import BLUE, GREY, INK, ORANGE, RED, legend_above
from raysl.report.measure import Measure
from raysl.sweep.trial import Status, Trial

STATUS_TEXTS: dict[Status, str] = {
    "finished": "finished",
    "stopped": "stopped early",
    "running": "not ended",
    "waiting": "waiting",
    "failed": "failed",
}
"""A trial's status, in words for readers."""

_BRIGHTEST = 0.8  # share of the colour map; brighter colours are invisible on white


class Look(NamedTuple):
    """The mark of a trial."""

    color: str
    shape: str
    filled: bool
    line: str
    size_pt: float = 4.5


LOOKS = {
    "finished": Look(BLUE, "o", True, "-"),
    "stopped": Look(GREY, "o", False, "--"),
    "running": Look(GREY, ">", False, "-"),
    "failed": Look(RED, "x", True, ":"),
}
BEST = Look(ORANGE, "*", True, "-", size_pt=11)


def look_of(trial: Trial, best: Trial | None) -> Look:
    """Return the mark of a trial; the best one has its own."""
    return BEST if best is not None and trial == best else LOOKS[trial.status]


def bright(share: float) -> Any:
    """Return a colour visible on white, brighter for a larger share.

    Args:
        share: Brightness, clipped to [0, 1].
    """
    return colormaps["viridis"](_BRIGHTEST * min(max(share, 0.0), 1.0))


def marker(look: Look) -> dict[str, Any]:
    """Return matplotlib's arguments for a mark."""
    return {
        "marker": look.shape,
        "markersize": look.size_pt,
        "linestyle": "",
        "color": look.color,
        "markerfacecolor": look.color if look.filled else "white",
        "markeredgecolor": look.color if look is not BEST else INK,
        "markeredgewidth": 0.6 if look is BEST else 1.2,
    }


def draw_legend(
    figure: Figure,
    trials: Sequence[Trial],
    best: Trial | None,
    display: Measure,
    *,
    has_lines: bool,
) -> None:
    """Draw the metric's title and, below it, entries for the best trial and each status in use.

    Args:
        figure: The figure; the legend goes above its panels.
        trials: The trials in the picture.
        best: The marked trial; None for none.
        display: The metric.
        has_lines: Whether trials are curves, which end in their mark.
    """
    handles = []
    if best is not None and best in trials and best.metric is not None:
        text = f"best: trial {best.number}, {display.text(best.metric)}"
        handles.append(_handle(BEST, text, has_lines=has_lines))
    statuses = {trial.status for trial in trials}
    for status, look in LOOKS.items():
        if status in statuses:
            brighter = " (brighter: better)" if has_lines and status == "finished" else ""
            handles.append(_handle(look, STATUS_TEXTS[status] + brighter, has_lines=has_lines))
    legend_above(figure, handles, title=display.title)


def _handle(look: Look, text: str, *, has_lines: bool) -> Line2D:
    style = marker(look)
    if has_lines:
        style["linestyle"] = look.line
    if has_lines and look is LOOKS["finished"]:
        style.update(marker="", color=bright(0.5))
    return Line2D([], [], label=text, **style)
