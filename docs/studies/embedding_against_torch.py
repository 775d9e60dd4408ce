"""Compare embedding on Ray with plain torch loops, in turns in one run.

    python docs/studies/embedding_against_torch.py photos runs/mine

The loops are those of a script that gets everything right: no gradients, channels last, all threads
in the forward pass, a DataLoader with one worker per core. They are measured in processes of their
own, because a DataLoader forks its workers, which a process connected to Ray must not do.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from input_against_torch import PeerImages, Speed, in_own_process, local_cores, print_speeds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from raysl.benchmark.embedding import (
    decoding_rate,
    embedding_pools,
    endless_rows,
    measure_on_ray,
)
from raysl.benchmark.throughput import measure_batches
from raysl.embed.config import EmbedConfig
from raysl.embed.ray_embed import quiet
from raysl.embed.source import embedding_of, encoder_file
from raysl.encoder.file import load_encoder
from raysl.evaluate.embedding import (
    ChunkPlan,
    EmbeddingSpec,
    Features,
    images_per_chunk,
    normalisation,
    read_pixels,
    stream_here,
)
from raysl.run.ray_cluster import connect, disconnect
from raysl.sources.command_line import open_argument
from raysl.sources.source import Source
from raysl.train.batches import input_converter

LOOPS = {
    "torch": "torch DataLoader, torchvision on PIL, all threads forward",
    "own-decode": "torch DataLoader, raysl's decoding, all threads forward",
    "here": "raysl in one process, without Ray (num_workers=0)",
}
_ROWS = 1 << 20  # more than any measurement takes


class LoopTask(NamedTuple):
    """A loop to measure."""

    loop: str
    """Key of :data:`LOOPS`."""
    source: Source
    embedding: EmbeddingSpec
    cores: int
    seconds: float


class DecodedImages(Dataset[Any]):
    """The images of a source by row as raysl decodes them, ``(S, S, 3)`` uint8."""

    def __init__(self, source: Source, embedding: EmbeddingSpec) -> None:
        self.source = source
        self.embedding = embedding

    def __getitem__(self, row: int) -> Tensor:
        pixels, _ = read_pixels(self.source, np.array([row]), self.embedding)
        return torch.from_numpy(pixels[0])


def measure_loop(task: LoopTask) -> Speed:
    """Measure a loop in this process, which must not be connected to Ray."""
    torch.set_num_threads(task.cores)
    measured = measure_batches(
        lambda: features_here(task) if task.loop == "here" else features_of_loader(task),
        batch_size=images_per_chunk(task.embedding.size_px),
        round_batches=1 if task.loop == "here" else task.cores,
        size_of=lambda features: features.nbytes,
        seconds=task.seconds,
    )
    return Speed(measured.images_per_s, measured.first_batch_s)


def features_here(task: LoopTask) -> Iterator[Features]:
    """Yield the features of chunks, computed by raysl without Ray."""
    rows, size = endless_rows(task.source, count=_ROWS), images_per_chunk(task.embedding.size_px)
    chunks = ChunkPlan(rows, np.arange(0, len(rows), size), size, len(rows))
    for chunk in stream_here(task.source, chunks, task.embedding, num_threads=task.cores):
        yield chunk.features


@torch.inference_mode()
def features_of_loader(task: LoopTask) -> Iterator[Features]:
    """Yield the features of batches from a DataLoader, ``(N, D)`` float32."""
    embedding = task.embedding
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    mean, std = normalisation(embedding.encoder)
    network = load_encoder(embedding.encoder).to(device=device, memory_format=torch.channels_last)
    to_input = input_converter(device=device, mean=mean, std=std, channels_last=True)
    dataset: Dataset[Any] = DecodedImages(task.source, embedding)
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
        batch_size=images_per_chunk(embedding.size_px),
        sampler=endless_rows(task.source, count=_ROWS),
        num_workers=task.cores,
        pin_memory=on_gpu,
    )
    for batch in loader:
        if task.loop == "torch":
            images = batch.to(device, memory_format=torch.channels_last, non_blocking=True)
        else:
            images = to_input(batch.numpy())
        with torch.autocast(device.type, torch.bfloat16, enabled=embedding.precision == "bf16"):
            yield network(images).float().cpu().numpy()


def main(words: Sequence[str] | None = None) -> dict[str, list[Speed]]:
    """Measure, print and return the speeds by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", help="a source, as for raysl embed")
    parser.add_argument("encoder", help="a run folder, or an encoder.safetensors")
    parser.add_argument("overrides", nargs="*", help="settings of raysl embed: key=value")
    parser.add_argument("--loops", default=",".join(LOOPS), help=", ".join(LOOPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    arguments = parser.parse_args(words)
    loops = arguments.loops.split(",")
    if unknown := [loop for loop in loops if loop not in LOOPS]:
        parser.error(f"--loops: unknown {unknown[0]}; give some of {', '.join(LOOPS)}")
    config, source = open_argument(arguments, EmbedConfig, where="embedding_against_torch")
    embedding = embedding_of(encoder_file(arguments.encoder), config)
    speeds: dict[str, list[Speed]] = {name: [] for name in ("raysl", *loops)}
    started = connect()
    quiet()
    try:
        actors = embedding_pools(config.num_workers).num_cpu_actors
        expected = decoding_rate(source, embedding) * actors
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
            for loop in loops:
                task = LoopTask(loop, source, embedding, local_cores(), arguments.seconds)
                speeds[loop].append(in_own_process(measure_loop, task))
                expected = speeds[loop][-1].images_per_s
            measured = measure_on_ray(
                source,
                embedding,
                num_workers=config.num_workers,
                images_per_s=expected,
                seconds=arguments.seconds,
            )
            speeds["raysl"].append(Speed(measured.images_per_s, measured.first_batch_s))
    finally:
        if started:
            disconnect()
    print_speeds(speeds, LOOPS | {"raysl": f"raysl on Ray, {actors} actors"})
    return speeds


if __name__ == "__main__":
    main()
