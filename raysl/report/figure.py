"""Shared style of all pictures: size, colours, fonts, and writing a PNG.

Figures are created without pyplot, whose global state belongs to the main thread.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from raysl.folder.whole import appears_whole
from raysl.report.measure import number_text

DPI = 200  # the page shows a picture at half size, so 1 inch is 100 px of the page
WIDTH_IN = 6.6
NARROW_IN = 5.2  # for pictures whose text must be readable on a phone, 390 px wide
_PAD_IN = 0.08  # around axes

# Okabe and Ito 2008, "Color universal design": distinguishable with any colour blindness.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, LIGHT_GREY, INK = "#7A7A7A", "#D9D9D9", "#222222"

_MAX_NAME = 20
_LEGEND: dict[str, Any] = {
    "loc": "outside upper left",
    "ncols": 5,
    "frameon": False,
    "fontsize": 8,
    "title_fontsize": 9.5,
    "alignment": "left",
    "borderpad": 0.1,
    "borderaxespad": 0.5,
    "columnspacing": 1.4,
    "handletextpad": 0.5,
}
_LETTER_IN = 0.062  # width of a letter of a tick label


def new_figure(*, width_in: float = WIDTH_IN, height_in: float) -> Figure:
    """Return an empty white figure with a layout that separates texts."""
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=_PAD_IN, w_pad=_PAD_IN))
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure atomically."""
    with appears_whole(path, shared=True, synced=False) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def style_axes(axes: Axes, *, title: str, grid: str = "both") -> None:
    """Give axes a left-aligned title, a light grid behind the data and no box."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, parse_math=False)
    axes.set_axisbelow(True)
    axes.grid(True, axis=grid, color=LIGHT_GREY, linewidth=0.6)  # type: ignore[arg-type]
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)


def tick_text(value: float, _: float = 0) -> str:
    """Format the number at a tick, with matplotlib's signature."""
    return number_text(value)


def legend_above(figure: Figure, handles: Sequence[Artist], *, title: str) -> None:
    """Put a title, and below it a legend in one line, above a figure."""
    figure.legend(handles=handles, title=title, **_LEGEND)


def turned_in(texts: Sequence[str], room_in: float) -> float:
    """Return the height in inches of tick labels if they must be vertical, else 0.

    Args:
        texts: The labels, evenly spaced along an axis.
        room_in: Length of the axis in inches.
    """
    longest_in = _LETTER_IN * max(map(len, texts))
    return longest_in if longest_in > 0.9 * room_in / len(texts) else 0.0


def drawable_name(name: str, *, otherwise: str) -> str:
    """Return a short name on one line, or ``otherwise`` if the font lacks some of its letters.

    Classes may have any name; matplotlib has one font and warns about each missing letter.
    """
    short = " ".join(name.split())
    if len(short) > _MAX_NAME:
        short = short[: _MAX_NAME - 3] + "..."
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    is_drawable = all(font.get_char_index(ord(letter)) for letter in short)
    return short if short and is_drawable else otherwise


def show_pixels(
    axes: Axes,
    image: npt.NDArray[np.uint8],
    *,
    extent: tuple[float, float, float, float],
    room_px: float,
) -> None:
    """Show an image with square pixels if it is enlarged, and averaged if it shrinks."""
    enlarged = max(image.shape[:2]) <= room_px
    kind = "nearest" if enlarged else "hanning"
    axes.imshow(image, extent=extent, interpolation=kind, interpolation_stage="data", zorder=3)
