"""Measure embedding on Ray, and estimate the cost of very many images from the measured rates."""

import math
import time
from typing import NamedTuple

import numpy as np
import torch

from raysl.benchmark.throughput import Throughput, measure_batches
from raysl.embed.ray_embed import Pools, plan_pools, stream_on_ray
from raysl.evaluate.embedding import ChunkPlan, EmbeddingSpec, Rows, images_per_chunk, read_pixels
from raysl.sources.source import Source

_EXTRA_ROUNDS = 2  # at the end, when some actors are idle; they are not counted
_MANY_CHUNKS = 1 << 20  # more than any cluster has actors
_SAMPLE_ROWS = 256
_MATRIX_SIDE = 1024
_NUM_PRODUCTS = 8

_ROW_BYTES = 40  # approximate size of id, row and label
_CHUNKS_PER_WORKER = 2  # in the object store
_FLOAT32_BYTES = 4
_CHANNELS = 3
_DAY_S = 86_400


def endless_rows(source: Source, *, count: int) -> Rows:
    """Return ``(count,)`` rows of a source; after the last row, the first one follows."""
    return np.arange(count, dtype=np.int64) % int(source.group_sizes.sum())


def sample_rows(source: Source) -> Rows:
    """Return the first rows of a source, at most 256, to measure its images."""
    return np.arange(min(_SAMPLE_ROWS, int(source.group_sizes.sum())), dtype=np.int64)


def embedding_pools(num_workers: int | None) -> Pools:
    """Return the pools of actors that would embed a large source on the connected cluster."""
    return plan_pools(num_workers, max_actors=_MANY_CHUNKS)


def measure_on_ray(
    source: Source,
    embedding: EmbeddingSpec,
    *,
    num_workers: int | None,
    images_per_s: float,
    seconds: float,
) -> Throughput:
    """Measure the stream of features on the connected cluster, from each actor's second chunk on.

    Args:
        source: The images; after the last image, the first one follows.
        embedding: The encoder, and how images are cropped for it.
        num_workers: Number of actors on CPUs; None starts one per free CPU.
        images_per_s: Approximate expected speed.
        seconds: Duration of the measurement at that speed.
    """
    size = images_per_chunk(embedding.size_px)
    actors = embedding_pools(num_workers).num_cpu_actors
    rounds = max(3, math.ceil(images_per_s * seconds / (size * actors)))
    count = (1 + rounds + _EXTRA_ROUNDS) * actors * size
    rows = endless_rows(source, count=count)
    chunks = ChunkPlan(rows, np.arange(0, count, size, dtype=np.int64), size, count)
    return measure_batches(
        lambda: stream_on_ray(source, chunks, embedding, num_workers=num_workers),
        batch_size=size,
        round_batches=actors,
        size_of=lambda chunk: chunk.features.nbytes,
        count=rounds * actors,
    )


def decoding_rate(source: Source, embedding: EmbeddingSpec) -> float:
    """Return the images per second that one core reads and decodes."""
    rows = sample_rows(source)
    read_pixels(source, rows[:1], embedding)  # opens files, which is not to be timed
    began = time.perf_counter()
    read_pixels(source, rows, embedding)
    return len(rows) / (time.perf_counter() - began)


def multiplication_rate() -> float:
    """Return the multiplications per second of float32 matrix products, on a GPU or on one core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=device)
    times = []
    for _ in range(_NUM_PRODUCTS):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the GPU
        times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return float(_MATRIX_SIDE**3 / min(times))


class EmbeddingCosts(NamedTuple):
    """The measured rates and sizes that an estimate is computed from."""

    num_images: int
    embed_dim: int
    bytes_per_feature: int
    """4, or 2 with store=float16."""
    image_bytes: float
    """Mean size of an encoded image of the source."""
    size_px: int
    chunk_images: int
    images_per_s_per_worker: float
    """Measured speed of one actor that decodes and encodes on a CPU, or of one GPU."""
    num_workers: int
    """Number of GPUs, or of CPUs without GPUs."""
    decode_images_per_s_per_cpu: float
    """Measured speed of reading and decoding on one core."""
    multiplications_per_s: float
    """Measured speed of float32 matrix products on one worker; a multiplication and its addition
    count once."""
    shard_bytes: int


class PlanLine(NamedTuple):
    """A quantity of the estimate, with its formula."""

    what: str
    formula: str
    value: float
    unit: str


def plan_embedding(costs: EmbeddingCosts) -> list[PlanLine]:
    """Estimate time, storage and traffic, each with its formula.

    M images, D features of b bytes, G workers at r images/s each, c images per chunk, S pixels per
    side, f multiplications/s per worker, d images/s that a CPU decodes.
    """
    m, dim, width = costs.num_images, costs.embed_dim, costs.bytes_per_feature
    total_rate = costs.num_workers * costs.images_per_s_per_worker
    features = float(m) * dim * width
    storage = features + float(m) * _ROW_BYTES
    in_flight = costs.num_workers * _CHUNKS_PER_WORKER * costs.chunk_images
    store = in_flight * (_CHANNELS * costs.size_px**2 + dim * _FLOAT32_BYTES)
    search_s = float(m) * m * dim / (costs.num_workers * costs.multiplications_per_s)
    query_s = float(m) * dim / (costs.num_workers * costs.multiplications_per_s)
    return [
        PlanLine("features", f"M (D b + {_ROW_BYTES})", storage, "bytes"),
        PlanLine("shards", "M D b / shard_mib", max(1.0, features / costs.shard_bytes), "files"),
        PlanLine("time", "M / (G r)", m / total_rate, "s"),
        PlanLine("worker days", "M / r", m / costs.images_per_s_per_worker / _DAY_S, "days"),
        PlanLine(
            "read from the source", "G r image bytes", total_rate * costs.image_bytes, "bytes/s"
        ),
        PlanLine(
            "CPUs that decode", "G r / d", total_rate / costs.decode_images_per_s_per_cpu, "CPUs"
        ),
        PlanLine(
            "object store of all nodes",
            f"{_CHUNKS_PER_WORKER} G c (3 S^2 + {_FLOAT32_BYTES} D)",
            store,
            "bytes",
        ),
        PlanLine(
            "features to the writing process",
            "4 G r D",
            total_rate * dim * _FLOAT32_BYTES,
            "bytes/s",
        ),
        PlanLine("one query, exact", "M D / (G f)", query_s, "s"),
        PlanLine("all against all, exact", "M^2 D / (G f)", search_s, "s"),
    ]
