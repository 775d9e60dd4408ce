"""Compare methods: draw their loss curves, and the accuracy that training gained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes

from raysl.errors import DataError
from raysl.report.figure import BLUE, GREY, INK, new_figure, save_png, style_axes

_COLUMNS = 4
_ROW_IN = 1.35
_BAR_IN = 0.26


class RunCurve(Protocol):
    """The interface of a run to draw."""

    @property
    def name(self) -> str:
        """Name of the run."""

    @property
    def steps(self) -> Sequence[int]:
        """Optimizer steps with a loss."""

    @property
    def losses(self) -> Sequence[float]:
        """The loss at each of these steps."""

    @property
    def untrained_knn_top1(self) -> float:
        """Accuracy of the encoder before training, in [0, 1]."""

    @property
    def knn_top1(self) -> float:
        """Accuracy after training, in [0, 1]."""


def draw_loss_curves(path: Path, runs: Sequence[RunCurve]) -> None:
    """Draw the loss of each run over its optimizer steps, one panel for each run.

    Raises:
        DataError: If there is no run.
    """
    if not runs:
        raise DataError("no run: there is nothing to draw")
    num_rows = -(-len(runs) // _COLUMNS)
    figure = new_figure(width_in=8.0, height_in=0.3 + _ROW_IN * num_rows)
    grid = figure.subplots(num_rows, _COLUMNS, squeeze=False)
    for axes, run in zip(grid.flat, runs, strict=False):
        style_axes(axes, title=run.name)
        axes.plot(run.steps, run.losses, color=BLUE, linewidth=1.2)
        axes.locator_params(axis="both", nbins=4)
        axes.tick_params(labelsize=6.5)
    for axes in list(grid.flat)[len(runs) :]:
        axes.remove()
    figure.supxlabel("optimizer step", fontsize=9, color=INK)
    figure.supylabel("training loss", fontsize=9, color=INK)
    save_png(figure, path)


def draw_gains(path: Path, runs: Sequence[RunCurve]) -> None:
    """Draw nearest-neighbour accuracy before and after training, one line for each run, best first.

    Raises:
        DataError: If there is no run.
    """
    if not runs:
        raise DataError("no run: there is nothing to draw")
    ordered = sorted(runs, key=lambda run: run.knn_top1)
    figure = new_figure(height_in=0.8 + _BAR_IN * len(runs))
    axes: Axes = figure.subplots()
    style_axes(axes, title="Nearest-neighbour accuracy, %: before training (o) and after", grid="x")
    for place, run in enumerate(ordered):
        before, after = 100 * run.untrained_knn_top1, 100 * run.knn_top1
        axes.plot([before, after], [place, place], color=BLUE, linewidth=1.6, zorder=2)
        axes.plot(before, place, "o", color="white", markeredgecolor=GREY, markersize=5, zorder=3)
        axes.plot(after, place, "o", color=BLUE, markersize=6, zorder=4)
        axes.annotate(
            f"{after:.1f}",
            (after, place),
            xytext=(6 if after >= before else -6, 0),
            textcoords="offset points",
            ha="left" if after >= before else "right",
            va="center",
            fontsize=7.5,
            color=INK,
        )
    axes.set_yticks(range(len(ordered)), [run.name for run in ordered], fontsize=8)
    axes.margins(x=0.08)
    save_png(figure, path)
