"""Draw the attention maps of a vision transformer's last block, head by head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from torch import Tensor

from raysl.nn.vit import VisionTransformer
from raysl.report.figure import (
    DPI,
    INK,
    NARROW_IN,
    new_figure,
    save_png,
    show_pixels,
)

MOST_HEADS = 4
NUM_IMAGES = 6

_HEAD_IN = 0.3
_OVERLAY = 0.6  # weight of the colour map over the grey image
_COLORS = colormaps["inferno"]


@torch.no_grad()
def attention_maps(net: VisionTransformer, images: Tensor) -> npt.NDArray[np.float32]:
    """Return each head's attention from the class token to the patches.

    Args:
        net: The network, in evaluation mode.
        images: ``(N, 3, H, W)`` float, normalised.

    Returns:
        ``(N, heads, H / P, W / P)``, each map scaled from its minimum (0) to its maximum (1).
    """
    rows, columns = (side // net.patch_size_px for side in images.shape[-2:])
    maps = net.last_attention(images).float().unflatten(2, (rows, columns)).cpu().numpy()
    return _stretch(maps)


def _stretch(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale each map from its minimum (0) to its maximum (1)."""
    low = maps.min(axis=(-2, -1), keepdims=True)
    high = maps.max(axis=(-2, -1), keepdims=True)
    stretched: npt.NDArray[np.float32] = (maps - low) / np.maximum(high - low, 1e-12)
    return stretched


def draw_attention(
    path: Path,
    net: VisionTransformer,
    pixels: npt.NDArray[np.uint8],
    *,
    to_input: Callable[[npt.NDArray[np.uint8]], Tensor],
) -> None:
    """Draw images, the mean attention of all heads, and the first heads separately.

    Args:
        path: PNG to write.
        net: The encoder's network, in evaluation mode.
        pixels: ``(N, S, S, 3)`` uint8, at the encoder's size.
        to_input: Converts the pixels to ``(N, 3, S, S)``, normalised.
    """
    maps = attention_maps(net, to_input(pixels))
    num_heads = maps.shape[1]
    mean = _stretch(maps.mean(axis=1, keepdims=True))
    drawn = np.concatenate([mean, maps[:, :MOST_HEADS]], axis=1)
    heads = [f"head {number + 1}" for number in range(min(num_heads, MOST_HEADS))]
    columns = ["image", f"mean of {num_heads}", *heads]
    cell_in = min(NARROW_IN / len(columns), 1.3)
    figure = new_figure(width_in=cell_in * len(columns), height_in=cell_in * len(pixels) + _HEAD_IN)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, len(columns)), ylim=(len(pixels), -_HEAD_IN / cell_in), aspect="equal")
    axes.set_axis_off()
    gap = 0.03
    for row, image in enumerate(pixels):
        cells = [image, *(_overlay(image, each) for each in drawn[row])]
        for column, cell in enumerate(cells):
            box = (column + gap, column + 1 - gap, row + 1 - gap, row + gap)
            show_pixels(axes, cell, extent=box, room_px=cell_in * DPI)
    text: dict[str, Any] = {"ha": "center", "va": "baseline", "fontsize": 9.5, "color": INK}
    for column, name in enumerate(columns):
        axes.text(column + 0.5, -0.09 / cell_in, name, **text)
    save_png(figure, path)


def _overlay(
    image: npt.NDArray[np.uint8], attention: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """Overlay a grey image with a colour map, from dark (low) to bright yellow (high)."""
    height, width = image.shape[:2]
    grown = cv2.resize(attention, (width, height), interpolation=cv2.INTER_NEAREST)
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    colors = 255 * _COLORS(grown)[..., :3]
    mixed: npt.NDArray[np.uint8] = (_OVERLAY * colors + (1 - _OVERLAY) * grey).astype(np.uint8)
    return mixed
