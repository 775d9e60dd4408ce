"""Draw a grid of framed images with text below each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from raysl.augment.crop import Image
from raysl.report.figure import DPI, INK, new_figure, save_png, show_pixels

_TEXT_IN = 0.36  # two lines under an image
_HEAD_IN = 0.34


class Cell(NamedTuple):
    """A framed image of the grid."""

    image: Image
    lines: tuple[str, ...]
    """Text below the image, at most two lines."""
    color: str
    """Colour of the frame."""
    dashed: bool = False
    """Whether the frame is dashed."""


def save_grid(
    path: Path, rows: Sequence[Sequence[Cell]], *, cell_in: float, head: str = ""
) -> None:
    """Draw framed images in rows, with up to two lines of text below each.

    Args:
        path: PNG to write.
        rows: Cells of each row; rows may differ in length.
        cell_in: Width of a cell in inches.
        head: Line at the top; empty for none.
    """
    row_in = cell_in + _TEXT_IN
    top = _HEAD_IN if head else 0.0
    width = cell_in * max(len(row) for row in rows)
    height = row_in * len(rows) + top
    figure = new_figure(width_in=width, height_in=height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.set_axis_off()
    axes.text(0.05, 0.7 * top, head, fontsize=10.5, color=INK, weight="bold", parse_math=False)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            corner = {"left": column * cell_in, "top": top + number * row_in}
            _put(axes, cell, side=cell_in, **corner)
    axes.set(xlim=(0, width), ylim=(height, 0))  # drawing images has changed the limits
    save_png(figure, path)


def _put(axes: Axes, cell: Cell, *, left: float, top: float, side: float) -> None:
    gap = 0.05
    cell_in, side = side, side - 2 * gap
    x, y = left + gap, top + gap
    show_pixels(axes, cell.image, extent=(x, x + side, y + side, y), room_px=side * DPI)
    frame: dict[str, Any] = {"edgecolor": cell.color, "linewidth": 2.2, "zorder": 4}
    style = (0, (3, 1.5)) if cell.dashed else "solid"
    axes.add_patch(Rectangle((x, y), side, side, fill=False, linestyle=style, **frame))
    text: dict[str, Any] = {"ha": "center", "va": "baseline", "fontsize": 9.5, "color": INK}
    for line, words in enumerate(cell.lines):
        anchor = (left + cell_in / 2, top + cell_in + 0.1 + 0.16 * line)
        axes.text(*anchor, words, parse_math=False, **text)
