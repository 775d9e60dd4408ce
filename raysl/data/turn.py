"""Rotate and mirror pixels by their EXIF orientation, without interpolation."""

import cv2

from raysl.augment.crop import Image

SWAPS_SIDES_FROM = 5
"""Orientations from this one on swap width and height."""


def turn(pixels: Image, orientation: int) -> Image:
    """Return uint8 pixels ``(H, W)`` or ``(H, W, C)`` upright.

    Args:
        pixels: The pixels as stored.
        orientation: An EXIF orientation, 1 to 8; any other value changes nothing.

    Source: CIPA DC-008 (Exif 2.32), sec. 4.6.4, tag 0x0112.
    """
    match orientation:
        case 2:
            return cv2.flip(pixels, 1)  # type: ignore[return-value]
        case 3:
            return cv2.rotate(pixels, cv2.ROTATE_180)  # type: ignore[return-value]
        case 4:
            return cv2.flip(pixels, 0)  # type: ignore[return-value]
        case 5 | 6 | 7 | 8:
            return _swap_sides(pixels, orientation)
    return pixels


def _swap_sides(pixels: Image, orientation: int) -> Image:
    turned = cv2.transpose(pixels)
    flips = {5: None, 6: 1, 7: -1, 8: 0}[orientation]
    return turned if flips is None else cv2.flip(turned, flips)  # type: ignore[return-value]
