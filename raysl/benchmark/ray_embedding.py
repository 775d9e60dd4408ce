"""Measure embedding on Ray Data."""

import math

import numpy as np

from raysl.benchmark.embedding_peer import endless_rows
from raysl.benchmark.throughput import Throughput, measure_batches
from raysl.embed.ray_embed import Pools, plan_pools, stream_on_ray
from raysl.evaluate.embedding import Chunks, Embedding, chunk_images
from raysl.sources.source import Source

_EXTRA_ROUNDS = 2  # at the end, where some actors have nothing left to do: not counted
_MANY = 1 << 20


def embedding_pools(num_workers: int | None) -> Pools:
    """Return the actors that would embed a large source on the connected cluster."""
    return plan_pools(num_workers, most=_MANY)


def measure_on_ray(
    source: Source,
    embedding: Embedding,
    *,
    num_workers: int | None,
    images_per_s: float,
    seconds: float,
) -> Throughput:
    """Measure the stream of features after each actor has delivered once.

    Args:
        source: The images; from the start again where they end.
        embedding: What is done to them.
        num_workers: Actors on CPUs; None takes one a free CPU.
        images_per_s: About what is expected.
        seconds: How long to measure at that speed.
    """
    size = chunk_images(embedding.size_px)
    actors = embedding_pools(num_workers).num_cpu_actors
    rounds = max(3, math.ceil(images_per_s * seconds / (size * actors)))
    count = (1 + rounds + _EXTRA_ROUNDS) * actors * size
    rows = endless_rows(source, count=count)
    chunks = Chunks(rows, np.arange(0, count, size, dtype=np.int64), size, count)
    return measure_batches(
        lambda: stream_on_ray(source, chunks, embedding, num_workers=num_workers),
        batch_size=size,
        round_batches=actors,
        size_of=lambda chunk: chunk.features.nbytes,
        count=rounds * actors,
    )
