"""Time plain torch embedding loops, the baseline for embedding on Ray.

Each runs in a process of its own (``python -m raysl.benchmark.embedding_peer``, a pickled task in,
a JSON object out): a DataLoader forks its workers, which a process connected to Ray must not do.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from raysl.benchmark.input_peer import PeerImages
from raysl.benchmark.own_process import answer, ask
from raysl.benchmark.throughput import measure_batches
from raysl.encoder.file import load_encoder
from raysl.evaluate.embedding import (
    Chunks,
    Embedding,
    Features,
    Rows,
    chunk_images,
    normalisation,
    read_pixels,
    stream_here,
)
from raysl.sources.source import Source
from raysl.train.batches import input_converter

LOOPS = {
    "torch": "torch DataLoader, torchvision on PIL, forward with all threads",
    "own-decode": "torch DataLoader, raysl's decoding, forward with all threads",
    "here": "raysl in one process, without Ray (num_workers=0)",
}
_ROUNDS = 1 << 20  # of the source: more than any measurement takes


class LoopTask(NamedTuple):
    """What to time."""

    loop: str  # one of LOOPS
    source: Source
    embedding: Embedding
    cores: int
    seconds: float


class LoopSpeed(NamedTuple):
    """What a loop reached."""

    images_per_s: float
    first_batch_s: float


def endless_rows(source: Source, *, count: int) -> Rows:
    """Return so many rows of a source, from the start again where it ends."""
    return np.arange(count, dtype=np.int64) % int(source.group_sizes.sum())


def run_loop(task: LoopTask) -> LoopSpeed:
    """Time a loop in a process of its own.

    Raises:
        DataError: If it fails.
    """
    return LoopSpeed(**ask("raysl.benchmark.embedding_peer", task, name=LOOPS[task.loop]))


def measure_loop(task: LoopTask) -> LoopSpeed:
    """Time a loop in this process, which must not be connected to Ray."""
    torch.set_num_threads(task.cores)
    size = chunk_images(task.embedding.size_px)
    seen = measure_batches(
        lambda: _here(task) if task.loop == "here" else _loader(task, size),
        batch_size=size,
        round_batches=1 if task.loop == "here" else task.cores,
        size_of=lambda features: features.nbytes,
        seconds=task.seconds,
    )
    return LoopSpeed(seen.images_per_s, seen.first_batch_s)


def _here(task: LoopTask) -> Iterator[Features]:
    rows = endless_rows(task.source, count=_ROUNDS)
    size = chunk_images(task.embedding.size_px)
    chunks = Chunks(rows, np.arange(0, len(rows), size), size, len(rows))
    for chunk in stream_here(task.source, chunks, task.embedding, num_threads=task.cores):
        yield chunk.features


@torch.inference_mode()
def _loader(task: LoopTask, batch_size: int) -> Iterator[Features]:
    """Yield features as a script does that gets everything right: no gradient, channels last."""
    embedding = task.embedding
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    mean, std = normalisation(embedding.encoder)
    network = load_encoder(embedding.encoder).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    to_input = input_converter(device=device, mean=mean, std=std, channels_last=True)
    dataset: Dataset[Any] = _Decoded(task.source, embedding)
    if task.loop == "torch":
        side = round(embedding.size_px / embedding.crop_fraction)
        steps = [
            transforms.Resize(side),
            transforms.CenterCrop(embedding.size_px),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
        dataset = PeerImages(task.source, transforms.Compose(steps))
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=endless_rows(task.source, count=_ROUNDS),  # type: ignore[arg-type] # any iterable
        num_workers=task.cores,
        pin_memory=on_gpu,
    )
    for batch in loader:
        images: Tensor
        if task.loop == "torch":
            images = batch.to(device, memory_format=torch.channels_last, non_blocking=True)
        else:
            images = to_input(batch.numpy())
        with torch.autocast(device.type, torch.bfloat16, enabled=embedding.precision == "bf16"):
            yield network(images).float().cpu().numpy()


class _Decoded(Dataset[Any]):
    """The images of rows as raysl decodes them, ``(S, S, 3)`` uint8."""

    def __init__(self, source: Source, embedding: Embedding) -> None:
        self.source = source
        self.embedding = embedding

    def __getitem__(self, row: int) -> Tensor:
        pixels, _ = read_pixels(self.source, np.array([row]), self.embedding)
        return torch.from_numpy(pixels[0])


if __name__ == "__main__":
    answer(measure_loop)
