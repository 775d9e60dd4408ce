"""Draw a contact sheet: images of a source with the names of their classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from raysl.augment.crop import Image
from raysl.errors import DataError
from raysl.report.figure import DPI, GREY, INK, drawable_name, new_figure, save_png, show_pixels

WIDTH_IN = 9.0
_MAX_ROW_IN = 1.0  # largest height of a row
_GAP_IN = 0.06
_CAPTION_IN = 0.16
_HEAD_IN = 0.62
_MARGIN_IN = 0.18
# A cell's aspect ratio is between 1 / this and this; a more elongated image is centred in it.
_MAX_ASPECT = 2.5
_CAPTION_LETTERS_PER_IN = 16


class _Row(NamedTuple):
    indices: list[int]  # of the images
    height_in: float


def draw_contact_sheet(
    path: Path,
    images: Sequence[Image],
    *,
    captions: Sequence[str] | None,
    title: str,
    subtitle: str = "",
) -> None:
    """Draw images, uncropped, in rows of cells; all cells of a row have the same height.

    Args:
        path: PNG to write.
        images: ``(H, W, 3)`` uint8 RGB, of any size.
        captions: Caption of each image, such as its class; None for no captions.
        title: Title of the sheet.
        subtitle: Line below the title.

    Raises:
        DataError: If there is no image, or the file cannot be written.
    """
    if not images:
        raise DataError(f"{path}: there are no images for a contact sheet")
    caption_in = 0.0 if captions is None else _CAPTION_IN
    aspects = [_cell_aspect(image) for image in images]
    rows = _arrange(aspects)
    height_in = _HEAD_IN + _MARGIN_IN
    height_in += sum(row.height_in + caption_in + _GAP_IN for row in rows)
    figure = new_figure(width_in=WIDTH_IN, height_in=height_in)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, WIDTH_IN), ylim=(height_in, 0))
    axes.set_axis_off()
    text_options: dict[str, Any] = {"ha": "left", "va": "baseline", "parse_math": False}
    axes.text(_MARGIN_IN, 0.3, title, fontsize=12, color=INK, weight="bold", **text_options)
    axes.text(_MARGIN_IN, 0.49, subtitle, fontsize=8.5, color=GREY, **text_options)
    top = _HEAD_IN
    for row in rows:
        left = _MARGIN_IN
        for index in row.indices:
            width = aspects[index] * row.height_in
            _put(
                axes, images[index], left=left, top=top, cell_width=width, cell_height=row.height_in
            )
            if captions is not None:
                text = _shorten(captions[index], width)
                anchor = (left, top + row.height_in + 0.115)
                axes.text(*anchor, text, fontsize=6.5, color=INK, **text_options)
            left += width + _GAP_IN
        top += row.height_in + caption_in + _GAP_IN
    # Drawing images has changed the limits of the axes.
    axes.set(xlim=(0, WIDTH_IN), ylim=(height_in, 0))
    try:
        save_png(figure, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from None


def _cell_aspect(image: Image) -> float:
    height, width = image.shape[:2]
    aspect: float = width / height
    return min(max(aspect, 1 / _MAX_ASPECT), _MAX_ASPECT)


def _arrange(aspects: Sequence[float]) -> list[_Row]:
    """Arrange images in rows that fill the sheet's width.

    A last row that does not fill it has the mean height of the other rows.
    """
    width_in = WIDTH_IN - 2 * _MARGIN_IN
    rows: list[_Row] = []
    row: list[int] = []
    for index in range(len(aspects)):
        row.append(index)
        height = _height(row, aspects, width_in)
        if height <= _MAX_ROW_IN:
            rows.append(_Row(row, height))
            row = []
    if row:
        mean_height = sum(each.height_in for each in rows) / len(rows) if rows else _MAX_ROW_IN
        rows.append(_Row(row, mean_height))
    return rows


def _height(indices: Sequence[int], aspects: Sequence[float], width_in: float) -> float:
    """Return the height at which images side by side have the given total width."""
    gaps = _GAP_IN * (len(indices) - 1)
    return (width_in - gaps) / sum(aspects[index] for index in indices)


def _put(
    axes: Axes, image: Image, *, left: float, top: float, cell_width: float, cell_height: float
) -> None:
    """Draw an image centred in a cell."""
    aspect = image.shape[1] / image.shape[0]
    width, height = min(cell_width, cell_height * aspect), min(cell_height, cell_width / aspect)
    x, y = left + (cell_width - width) / 2, top + (cell_height - height) / 2
    room_px = max(width, height) * DPI
    show_pixels(axes, image, extent=(x, x + width, y + height, y), room_px=room_px)


def _shorten(name: str, width_in: float) -> str:
    """Shorten a name to fit; "?" if undrawable."""
    max_letters = max(4, int(width_in * _CAPTION_LETTERS_PER_IN))
    short = drawable_name(name, otherwise="?")
    return short if len(short) <= max_letters else short[: max_letters - 2].rstrip(" .") + ".."
