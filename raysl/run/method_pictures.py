"""Save the pictures that a method makes of a few training images, for the report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysl.augment.pipeline import View, make_views
from raysl.data.block import INDEX, view_column
from raysl.data.decode import Flaw, decode_or_flaw
from raysl.folder.whole import appears_whole
from raysl.methods.base import Batch, ImageGrid, Method, Progress
from raysl.sources.source import Source
from raysl.train.batches import NumpyBatch

_NUM_IMAGES = 8


def write_method_pictures(
    path: Path,
    method: Method,
    *,
    source: Source,
    views: Sequence[View],
    to_batch: Callable[[NumpyBatch], Batch],
    progress: Progress,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write the pictures that a method makes; write no file if it makes none.

    Args:
        path: ``.npz`` to write: for each picture NAME its pixels, ``(rows, columns, S, S, 3)``
            uint8, ``NAME.columns`` and ``NAME.caption``.
        method: The method, in evaluation mode during the call.
        source: The training images; eight of them, evenly spaced, are shown.
        views: The kinds of view to make, with the random choices of epoch 0.
        to_batch: Converts a batch of the stream to the method's batch.
        progress: Progress at the end of the run.
        mean: Mean of red, green and blue in [0, 1], to undo the normalisation.
        std: Standard deviation of red, green and blue in [0, 1], to undo the normalisation.
    """
    batch = _sample(source, views, seed=progress.seed)
    if batch is None:
        return
    was_training = method.training
    method.eval()
    state = torch.get_rng_state()
    try:
        torch.manual_seed(progress.seed)
        pictures = method.pictures(to_batch(batch), progress)
    finally:
        torch.set_rng_state(state)
        method.train(was_training)
        method.zero_grad(set_to_none=True)
    if pictures:
        _write(path, pictures, mean=mean, std=std)


def _sample(source: Source, views: Sequence[View], *, seed: int) -> dict[str, Any] | None:
    total = int(source.group_sizes.sum())
    rows = np.unique(np.linspace(0, total - 1, min(_NUM_IMAGES, total)).astype(np.int64))
    used_rows: list[int] = []
    columns: list[list[npt.NDArray[np.uint8]]] = [[] for _ in views]
    for row, encoded in zip(rows.tolist(), source.read(rows), strict=True):
        image = decode_or_flaw(encoded, source.decoding(row))
        if isinstance(image, Flaw):
            continue
        image_views = make_views(image, views, seed=seed, epoch=0, index=row)
        for column, kind in zip(columns, image_views, strict=True):
            column.append(np.stack(kind))
        used_rows.append(row)
    if not used_rows:
        return None
    arrays = {view_column(number): np.stack(column) for number, column in enumerate(columns)}
    return {**arrays, INDEX: np.array(used_rows, dtype=np.int64)}


def _write(
    path: Path, pictures: Mapping[str, ImageGrid], *, mean: Sequence[float], std: Sequence[float]
) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, picture in pictures.items():
        arrays[name] = _pixels(picture, mean=mean, std=std)
        arrays[f"{name}.columns"] = np.array(picture.columns, dtype=np.str_)
        arrays[f"{name}.caption"] = np.array(picture.caption, dtype=np.str_)
    with appears_whole(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type] # the stub lacks keywords


def _pixels(
    picture: ImageGrid, *, mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.uint8]:
    images: Tensor = picture.images.detach().float().cpu()
    if picture.normalised:
        center, scale = (torch.tensor(list(x)).view(1, 1, 3, 1, 1) for x in (mean, std))
        images = images * scale + center
    pixels = images.clamp(0, 1).mul(255).round().byte()
    return np.ascontiguousarray(pixels.permute(0, 1, 3, 4, 2).numpy())
