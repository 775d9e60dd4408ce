"""Run the last operations of a view on the accelerator, a batch at a time.

Data workers then only decode and crop. They still draw the plans, so the views equal those of
``data.color_on: cpu`` up to rounding: each operation rounds to whole levels like its uint8
counterpart and differs from it by 0.03 levels on average; the hue, which OpenCV quantises to 256
steps, by 0.2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.augment.ops import (
    Blur,
    ColorJitter,
    CropPart,
    Cutout,
    Flip,
    Grey,
    Op,
    Sobel,
    Solarise,
)

Plans = npt.NDArray[np.float32]
Column = npt.NDArray[np.float32]

_LUMA = (0.299, 0.587, 0.114)


def apply_ops(images: Tensor, ops: Sequence[Op], numbers: Plans) -> Tensor:
    """Apply the planned operations.

    Args:
        images: ``(N, 3, S, S)`` float32 on the device, whole levels in [0, 255].
        ops: The operations, in order.
        numbers: ``(N, P)`` float32 on the CPU: the plans of all ops, concatenated.

    Returns:
        ``(N, 3, S, S)`` float32, whole levels in [0, 255].
    """
    taken = 0
    for op in ops:
        width, apply = _OPS[type(op)]
        plan = numbers[:, taken : taken + width]
        taken += width
        acts = np.flatnonzero(plan[:, 0])
        if len(acts):
            rows = _index(acts, images)
            images = images.index_copy(0, rows, apply(op, images[rows], plan[acts]))
    return images


def _crop(op: CropPart, images: Tensor, plan: Plans) -> Tensor:
    """Enlarge a part of each image by linear interpolation, one direction after the other."""
    rows = _enlarge(images, 2, first=plan[:, 1], length=plan[:, 3])
    return _levels(_enlarge(rows, 3, first=plan[:, 2], length=plan[:, 4]))


def _enlarge(images: Tensor, dim: int, *, first: Column, length: Column) -> Tensor:
    """Stretch ``length`` rows or columns, starting at ``first``, to the full side, per image."""
    size = images.shape[dim]
    place = (np.arange(size) + 0.5) * (length / size)[:, None] - 0.5  # (N, S), 0: the first one
    place = np.clip(place, 0, length[:, None] - 1)
    below = np.floor(place)
    above = np.minimum(below + 1, length[:, None] - 1)
    shape = [len(images), 1, 1, 1]
    shape[dim] = size
    wide = list(images.shape)

    def at(places: npt.NDArray[np.float64]) -> Tensor:
        index = _index((first[:, None] + places).astype(np.int64), images)
        return images.gather(dim, index.view(shape).expand(wide))

    share = torch.from_numpy((place - below).astype(np.float32)).to(images.device).view(shape)
    return torch.lerp(at(below), at(above), share)


def _flip(op: Flip, images: Tensor, plan: Plans) -> Tensor:
    return images.flip(3)


def _jitter(op: ColorJitter, images: Tensor, plan: Plans) -> Tensor:
    """Apply the four factors in the order planned for each image."""
    factors = torch.from_numpy(np.ascontiguousarray(plan[:, 1:5])).to(images.device)
    order = plan[:, 5:9].astype(np.int64)
    brightness = _brightness if op.brightness_kind == "multiply" else _added_brightness
    steps = (brightness, _contrast, _saturation, _hue)
    for place in range(4):
        for number, step in enumerate(steps):
            rows = _index(np.flatnonzero(order[:, place] == number), images)
            if len(rows):
                changed = step(images[rows], factors[rows, number].view(-1, 1, 1, 1))
                images = images.index_copy(0, rows, changed)
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _levels(images * factor)


def _added_brightness(images: Tensor, value: Tensor) -> Tensor:
    return _levels(images + 255 * value)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(images).mean(dim=(1, 2, 3), keepdim=True).round()
    return _levels(images * factor + mean * (1 - factor))


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _levels(images * factor + _luma(images) * (1 - factor))


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue; saturation and value stay.

    Source: Smith 1978, "Color gamut transform pairs" (the hexcone model).
    """
    value, _ = images.max(dim=1, keepdim=True)
    chroma = value - images.min(dim=1, keepdim=True).values
    red, green, blue = images.split(1, dim=1)
    safe = chroma.clamp(min=1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector = sector + 6 * shift
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    place = (sector + offsets) % 6
    share = torch.minimum(place, 4 - place).clamp(0, 1)
    return _levels(value - chroma * share)


def _grey(op: Grey, images: Tensor, plan: Plans) -> Tensor:
    return _luma(images).round().expand_as(images)


def _blur(op: Blur, images: Tensor, plan: Plans) -> Tensor:
    """Blur each image with its own Gaussian: a weighted sum of shifted images, in two passes."""
    half = min(int(plan[:, 1].max()) // 2, images.shape[2] - 1)
    distance = np.abs(np.arange(-half, half + 1))[None]
    weights = np.exp(-0.5 * (distance / plan[:, :1]) ** 2)
    weights[distance > (plan[:, 1:2] // 2)] = 0  # each image has its own number of taps
    weights /= weights.sum(axis=1, keepdims=True)
    kernel = torch.from_numpy(weights.astype(np.float32)).to(images.device)
    result = F.pad(images, (half, half, half, half), mode="reflect")
    for dim in (2, 3):
        size, shifted = images.shape[dim], result
        result = shifted.narrow(dim, half, size) * kernel[:, half].view(-1, 1, 1, 1)
        for tap in (tap for tap in range(2 * half + 1) if tap != half):
            result.addcmul_(shifted.narrow(dim, tap, size), kernel[:, tap].view(-1, 1, 1, 1))
    return _levels(result)


def _solarise(op: Solarise, images: Tensor, plan: Plans) -> Tensor:
    return torch.where(images >= op.threshold, 255 - images, images)


def _sobel(op: Sobel, images: Tensor, plan: Plans) -> Tensor:
    grey = F.pad(_luma(images).round(), (1, 1, 1, 1), mode="replicate")
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device)
    kernels = torch.stack([across, across.T]).unsqueeze(1)
    edges = F.conv2d(grey, kernels).square().sum(1, keepdim=True).sqrt()
    return _levels(edges / 4).expand_as(images)


def _cutout(op: Cutout, images: Tensor, plan: Plans) -> Tensor:
    size = images.shape[2]
    half = plan[:, 3] * size / 2
    places = torch.arange(size, device=images.device)

    def inside(center: npt.NDArray[np.float32]) -> Tensor:
        low, high = np.rint(center * size - half), np.rint(center * size + half)
        bounds = torch.from_numpy(np.stack([low, high])).to(images.device)
        return (places >= bounds[0, :, None]) & (places < bounds[1, :, None])

    square = inside(plan[:, 1])[:, None, :, None] & inside(plan[:, 2])[:, None, None, :]
    return torch.where(square, float(op.fill), images)


# For each op: the number of its parameters, and the function for the images it applies to.
_OPS: dict[type, tuple[int, Callable[[Any, Tensor, Plans], Tensor]]] = {
    CropPart: (5, _crop),
    Flip: (1, _flip),
    ColorJitter: (9, _jitter),
    Grey: (1, _grey),
    Blur: (2, _blur),
    Solarise: (1, _solarise),
    Sobel: (1, _sobel),
    Cutout: (4, _cutout),
}


def _levels(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255)


def _luma(images: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _index(rows: npt.NDArray[np.int64], images: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(images.device, non_blocking=True)
