"""Rotate images by quarter turns.

S. Gidaris, P. Singh, N. Komodakis: "Unsupervised Representation Learning by Predicting Image
Rotations", 2018, arXiv:1803.07728v1.
"""

import torch
from torch import Tensor

from raysl.errors import ShapeError

NUM_ROTATIONS = 4


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate each image by its own number of quarter turns, without interpolation.

    Args:
        images: ``(N, C, S, S)``, any dtype.
        turns: Quarter turns counter-clockwise, ``(N,)`` integers; 4 is a full turn.

    Returns:
        ``(N, C, S, S)``.

    Raises:
        ShapeError: If the images are not square or there is not one number per image.

    Source: Sec. 2.2: g(X|y) turns by y times 90 degrees, counted here from 0.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ShapeError(f"images must be (N, C, S, S) to be turned; got {tuple(images.shape)}")
    if turns.shape != images.shape[:1]:
        raise ShapeError(f"turns must be ({len(images)},), one per image; got {tuple(turns.shape)}")
    quarters = (turns % NUM_ROTATIONS).view(-1, 1, 1, 1)
    rotated = images
    for k in range(1, NUM_ROTATIONS):
        rotated = torch.where(quarters == k, torch.rot90(images, k, (2, 3)), rotated)
    return rotated
