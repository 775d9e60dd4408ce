"""The shared style of all pictures: size, colours and fonts; and writing a PNG.

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

DPI = 200  # pages show pictures at half size, so 1 inch is 100 px of the page
WIDTH_IN = 6.6
NARROW_IN = 5.2  # for pictures whose text must be readable on a phone of 390 px
_PAD_IN = 0.08  # around axes

# Distinguishable with any colour blindness: Okabe and Ito 2008, "Color universal design".
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, LIGHT_GREY, INK = "#7A7A7A", "#D9D9D9", "#222222"

_MAX_NAME_LETTERS = 20
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
    """Write a figure as a PNG file, atomically."""
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
    """Format the number at a tick; the signature is that of matplotlib's formatters."""
    return number_text(value)


def legend_above(figure: Figure, handles: Sequence[Artist], *, title: str) -> None:
    """Put a title above a figure, and a legend in one line below the title."""
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
    """Shorten a name to one line; return ``otherwise`` if the font lacks a letter of it.

    Classes may have any name, and matplotlib warns about each letter that its font lacks.
    """
    short = " ".join(name.split())
    if len(short) > _MAX_NAME_LETTERS:
        short = short[: _MAX_NAME_LETTERS - 3] + "..."
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
    """Draw an image, with sharp pixels if it is enlarged, smoothed if it is reduced.

    Args:
        axes: Axes to draw into.
        image: ``(H, W, 3)`` uint8.
        extent: Left, right, bottom and top in data coordinates.
        room_px: Longest side of the extent in pixels of the picture.
    """
    is_enlarged = max(image.shape[:2]) <= room_px
    method = "nearest" if is_enlarged else "hanning"
    axes.imshow(image, extent=extent, interpolation=method, interpolation_stage="data", zorder=3)
