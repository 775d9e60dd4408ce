"""Load images without augmentation; compute features of an encoder or of the bare pixels."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysl.augment.crop import Image, apply_crop, center_box
from raysl.data.decode import Flaw, decode_or_flaw
from raysl.nn.collectives import gather_batch_no_grad, rank_and_size
from raysl.sources.source import Labels, Source

Rows = npt.NDArray[np.int64]

_CACHE_BYTES = 1 << 30
_BATCH = 256
_MAX_PIXEL_SIDE = 32
_BLANK_SIDE = 32


def square(image: Image, *, size_px: int, crop_fraction: float) -> Image:
    """Crop an image to its centred square and resize it, as for evaluation.

    Args:
        image: ``(H, W, 3)`` uint8.
        size_px: Side of the result, S.
        crop_fraction: Side of the centred square over the image's short side, in (0, 1].

    Returns:
        ``(S, S, 3)`` uint8.
    """
    box = center_box(height=image.shape[0], width=image.shape[1], fraction=crop_fraction)
    return apply_crop(image, box, size_px=size_px)


class EvalImages:
    """Labelled images, decoded, cropped to a centred square and resized; deterministic.

    Args:
        source: The source of the images.
        rows: Rows of the images, ``(M,)``.
        labels: Class numbers of the images, ``(M,)``; -1 without a label.
        size_px: Side of the square given to the encoder.
        crop_fraction: Side of the centred square over the image's short side.
        num_threads: Number of decoding threads.
    """

    def __init__(
        self,
        source: Source,
        rows: Rows,
        labels: Labels,
        *,
        size_px: int,
        crop_fraction: float,
        num_threads: int,
    ) -> None:
        self.source = source
        self.rows = rows
        self.labels = labels
        self.size_px = size_px
        self.crop_fraction = crop_fraction
        self.num_threads = num_threads
        self.bad: set[int] = set()  # indices of bad images, which are replaced by black ones
        self._cache: dict[bytes, npt.NDArray[np.uint8]] = {}  # by the indices of a batch
        self._caches = len(rows) * size_px * size_px * 3 <= _CACHE_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image:
        """Return the original image at index ``index`` in [0, M).

        A bad image is recorded in ``bad``; a black one replaces it and counts like any other.
        """
        row = int(self.rows[index])
        image = decode_or_flaw(self.source.read([row])[0], self.source.decoding(row))
        if isinstance(image, Flaw):
            self.bad.add(index)
            return np.zeros((_BLANK_SIDE, _BLANK_SIDE, 3), dtype=np.uint8)
        return image

    def batches(self, indices: Rows) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield ``(B, S, S, 3)`` uint8 for these indices in order."""
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="raysl-eval") as pool:
            for start in range(0, len(indices), _BATCH):
                batch = indices[start : start + _BATCH]
                key = batch.tobytes()
                if key in self._cache:
                    yield self._cache[key]
                    continue
                pixels = np.stack(list(pool.map(self._square, batch.tolist())))
                if self._caches:
                    self._cache[key] = pixels
                yield pixels

    def _square(self, index: int) -> Image:
        return square(self.image(index), size_px=self.size_px, crop_fraction=self.crop_fraction)

    def pixels(self) -> npt.NDArray[np.float32]:
        """Return the bare pixels as features, ``(M, P * P)`` or ``(M, P * P * 3)`` in [0, 1].

        P is the shorter side of the first image, at most 32; grey images keep one channel.
        """
        first = self.image(0)
        side = min(*first.shape[:2], self.size_px, _MAX_PIXEL_SIDE)
        with ThreadPoolExecutor(self.num_threads) as pool:
            squares = np.stack(
                list(pool.map(lambda p: self._pixel_square(p, side), range(len(self))))
            )
        if (squares == squares[..., :1]).all():
            squares = squares[..., :1]
        return squares.reshape(len(squares), -1).astype(np.float32) / np.float32(255)

    def _pixel_square(self, index: int, side: int) -> Image:
        image = self.image(index)
        box = center_box(height=image.shape[0], width=image.shape[1], fraction=self.crop_fraction)
        patch = image[box.top : box.top + box.height, box.left : box.left + box.width]
        return cv2.resize(patch, (side, side), interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


@torch.no_grad()
def outputs(
    network: nn.Module,
    images: EvalImages,
    indices: Rows,
    *,
    to_input: Callable[[npt.NDArray[np.uint8]], Tensor],
) -> Tensor:
    """Return a network's outputs for some images, computed by this process alone.

    Args:
        network: Maps ``(B, 3, S, S)`` to ``(B, D)``. It runs in evaluation mode, with the running
            statistics of batch norm; its mode is restored.
        images: The images.
        indices: Indices of the images, ``(N,)``.
        to_input: Converts ``(B, S, S, 3)`` uint8 to the network's input on its device.

    Returns:
        ``(N, D)`` float32 on that device.
    """
    was_training = network.training
    network.eval()
    try:
        return torch.cat([network(to_input(each)).float() for each in images.batches(indices)])
    finally:
        network.train(was_training)


@torch.no_grad()
def embed(
    encoder: nn.Module, images: EvalImages, *, to_input: Callable[[npt.NDArray[np.uint8]], Tensor]
) -> Tensor:
    """Return the features of all images; the ranks share the work.

    Args:
        encoder: Maps ``(B, 3, S, S)`` to ``(B, D)``, as in :func:`outputs`.
        images: The images.
        to_input: Converts ``(B, S, S, 3)`` uint8 to the encoder's input on its device.

    Returns:
        ``(M, D)`` float32 on the CPU, the same on every rank.
    """
    mine = outputs(encoder, images, _share(len(images), *rank_and_size()), to_input=to_input)
    return gather_batch_no_grad(mine)[: len(images)].cpu()


@torch.no_grad()
def embed_alone(
    encoder: nn.Module,
    images: EvalImages,
    *,
    to_input: Callable[[npt.NDArray[np.uint8]], Tensor],
    num_ranks: int,
) -> Tensor:
    """Return the result of :func:`embed` on ``num_ranks`` ranks, computed by this process alone.

    It uses the same batches, because the last bits of a feature may depend on the other images of
    its batch.
    """
    parts = (_share(len(images), rank, num_ranks) for rank in range(num_ranks))
    features = [outputs(encoder, images, part, to_input=to_input) for part in parts]
    return torch.cat(features)[: len(images)].cpu()


def _share(num_images: int, rank: int, size: int) -> Rows:
    """Return the indices that a rank embeds: the same number on each; the last repeat an image."""
    share = -(-num_images // size)
    return np.minimum(np.arange(rank * share, (rank + 1) * share), num_images - 1)
