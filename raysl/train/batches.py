"""Convert batches of the data stream into the float tensors that methods take."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.augment.base import DeviceOperation
from raysl.augment.pipeline import apply_device_ops
from raysl.data.block import INDEX, is_view_column, numbers_column, view_column, view_kind
from raysl.methods.base import Batch

NumpyBatch = Mapping[str, Any]
"""Arrays of equal length by name; a column of views may be a tuple of arrays to concatenate."""


def batch_converter(
    to_views: Callable[[NumpyBatch], list[Tensor]],
    *,
    device: torch.device,
    labels: npt.NDArray[np.int64] | None = None,
) -> Callable[[NumpyBatch], Batch]:
    """Return a function that converts a batch of the stream to a method's batch.

    Args:
        to_views: The result of :func:`view_converter`.
        device: Destination of rows and labels.
        labels: The label of every row of the source, -1 where unknown; None if the method uses no
            labels.
    """

    def to_batch(batch: NumpyBatch) -> Batch:
        rows = np.asarray(batch[INDEX], dtype=np.int64)
        batch_labels = None if labels is None else torch.from_numpy(labels[rows]).to(device)
        return Batch(to_views(batch), as_tensor(rows).to(device), batch_labels)

    return to_batch


def view_converter(
    *,
    device: torch.device,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    channels_last: bool,
    device_ops: Sequence[Sequence[DeviceOperation]] = (),
) -> Callable[[NumpyBatch], list[Tensor]]:
    """Return a function that converts a batch's uint8 views to normalised float tensors.

    Each view of ``(N, V, S, S, 3)`` uint8 becomes ``(N, 3, S, S)`` float32 on the device. Pixels
    are transferred as uint8 and normalised there, once.

    Args:
        device: Destination of the views.
        mean: Mean of red, green and blue, for values in [0, 1].
        std: Standard deviation of red, green and blue, for values in [0, 1].
        channels_last: Memory layout of the views.
        device_ops: For each kind of view, the operations that the data workers left to the device;
            applied if the batch contains their plans.
    """
    center = torch.tensor(mean, device=device).mul_(255).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=device).mul_(255).reciprocal_().view(1, 3, 1, 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def to_views(batch: NumpyBatch) -> list[Tensor]:
        views: list[Tensor] = []
        for kind in sorted(view_kind(name) for name in batch if is_view_column(name)):
            column = batch[view_column(kind)]
            arrays = column if isinstance(column, tuple) else (column,)
            parts = [as_tensor(array).to(device, non_blocking=True) for array in arrays]
            plans = batch.get(numbers_column(kind))
            for number in range(parts[0].shape[1]):
                image = _join([part[:, number] for part in parts], layout)
                if plans is not None:
                    image = apply_device_ops(image, device_ops[kind], plans[:, number])
                    image = image.contiguous(memory_format=layout)
                views.append((image - center).mul_(scale))
        return views

    return to_views


def input_converter(
    *,
    device: torch.device,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    channels_last: bool,
) -> Callable[[npt.NDArray[np.uint8]], Tensor]:
    """Return a function that converts pixels to an encoder's input, as training does.

    It converts ``(N, S, S, 3)`` uint8 to ``(N, 3, S, S)`` float32 on the device, normalised there.

    Args:
        device: Destination of the images.
        mean: Mean of red, green and blue, for values in [0, 1].
        std: Standard deviation of red, green and blue, for values in [0, 1].
        channels_last: Memory layout of the images.
    """
    to_views = view_converter(device=device, mean=mean, std=std, channels_last=channels_last)

    def to_input(pixels: npt.NDArray[np.uint8]) -> Tensor:
        return to_views({view_column(0): pixels[:, None]})[0]

    return to_input


def _join(parts: list[Tensor], layout: torch.memory_format) -> Tensor:
    """Convert ``(N, S, S, 3)`` uint8 to ``(sum of N, 3, S, S)`` float32, copying pixels once."""
    floats = torch.empty(
        (sum(len(part) for part in parts), parts[0].shape[3], *parts[0].shape[1:3]),
        device=parts[0].device,
        memory_format=layout,
    )
    start = 0
    for part in parts:
        floats[start : start + len(part)] = part.permute(0, 3, 1, 2)
        start += len(part)
    return floats


def as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Wrap an array without a copy, even a read-only one: the tensor is never written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
