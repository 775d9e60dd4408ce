"""Compute the features of a source on Ray Data, using all nodes.

Without GPUs, one actor per CPU decodes and encodes chunks, so that no pixels pass through the
object store. With GPUs, actors on the CPUs decode and one actor per GPU encodes, because one core
cannot decode as fast as a GPU encodes. Ray replaces a lost actor or node and repeats its chunks;
each chunk carries its rows, so the order of results does not matter.
"""

import logging
import math
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import ray
import torch
from ray._private.state import available_resources_per_node
from ray.data import ActorPoolStrategy, Dataset, ExecutionOptions

from raysl.errors import ClusterError, DataError
from raysl.evaluate.embedding import (
    Advance,
    Chunk,
    ChunkPlan,
    EmbeddingSpec,
    EncoderRunner,
    Features,
    Rows,
    collect,
    cut_rows,
    normalisation,
    read_pixels,
)
from raysl.run.ray_bounds import bound_execution
from raysl.run.ray_cluster import READ_CPUS
from raysl.run.ray_data import PlanSource
from raysl.run.ray_errors import own_errors
from raysl.sources.source import Source

# Columns of the blocks that go from actor to actor.
_NUMBER, _PLACE, _PIXELS, _FLAW, _FEATURES = "number", "place", "pixels", "flaw", "features"
_MARGIN = 0.02  # CPUs of each node that stay free
_MIN_ACTOR_CPUS = 0.05
# Work that has just ended gives its CPUs back within a second or two; wait somewhat longer for it.
_SETTLE_S = 5.0
_FREE_WITHIN_S = 60.0
_POLL_S = 0.2
_GPU_ACTOR_CPUS = 0.5


class Pools(NamedTuple):
    """The number of actors, and the CPUs of each."""

    num_cpu_actors: int
    """Actors that decode and, without GPUs, encode too."""
    cpus_each: float
    num_gpu_actors: int
    """Actors that encode, each on a GPU."""
    cpus_each_gpu_actor: float


def features_on_ray(
    source: Source,
    rows: Rows,
    embedding: EmbeddingSpec,
    *,
    advance: Advance | None = None,
    num_workers: int | None = None,
) -> tuple[Features, dict[int, str]]:
    """Compute the features of some rows on the connected cluster.

    Args:
        source: The images; every node must be able to read them.
        rows: ``(M,)`` rows to embed.
        embedding: The encoder, and how images are cropped for it. Only this process reads its file.
        advance: Called with the number of images finished since the last call.
        num_workers: Number of actors on CPUs; None starts one per free CPU.

    Returns:
        ``(M, D)`` float32 in the order of ``rows``, and the reason for each row with a bad image:
        the same values that :func:`raysl.evaluate.embedding.features_here` returns.

    Raises:
        DataError: If the source or the encoder cannot be read.
        DivergedError: If a feature is not finite.
        ClusterError: If no CPU of the cluster is free, or actors are lost repeatedly.
    """
    chunks = cut_rows(np.asarray(rows, dtype=np.int64), size_px=embedding.size_px)
    if not len(chunks):
        raise DataError("no rows to embed: the source is empty, or no row was selected")
    stream = stream_on_ray(source, chunks, embedding, num_workers=num_workers)
    with closing(stream):
        return collect(chunks, stream, advance=advance)


def stream_on_ray(
    source: Source, chunks: ChunkPlan, embedding: EmbeddingSpec, *, num_workers: int | None = None
) -> Generator[Chunk, None, None]:
    """Yield the features of chunks in the order of their completion, computed on the cluster.

    Closing the iterator ends the work.

    Args:
        source: The images; every node must be able to read them.
        chunks: The rows to embed, in chunks.
        embedding: The encoder, and how images are cropped for it. Only this process reads its file.
        num_workers: Number of actors on CPUs; None starts one per free CPU.
    """
    normalisation(embedding.encoder)  # raises here, not in an actor, if the file is invalid
    pools = plan_pools(num_workers, max_actors=len(chunks))
    source.labels()  # read the labels once, in this process; they are sent with the source
    shared = ray.put((source, chunks))
    weights = ray.put(Path(embedding.encoder).read_bytes())
    dataset = _dataset(shared, weights, embedding, num_chunks=len(chunks), pools=pools)
    with own_errors("embedding"):
        blocks: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="numpy")
        for block in blocks:
            if len(block[_PLACE]):  # the last read task may yield numbers past the last chunk
                yield Chunk(block[_PLACE], block[_FEATURES], block[_FLAW])


def _dataset(
    shared: Any, weights: Any, embedding: EmbeddingSpec, *, num_chunks: int, pools: Pools
) -> Dataset:
    numbers = PlanSource(num_chunks)
    read = ray.data.read_datasource(
        numbers, override_num_blocks=numbers.num_blocks, num_cpus=READ_CPUS, concurrency=1
    )
    on_cpu: dict[str, Any] = {
        "batch_size": 1,
        "compute": ActorPoolStrategy(size=pools.num_cpu_actors),
        "num_cpus": pools.cpus_each,
    }
    if not pools.num_gpu_actors:
        embedded = read.map_batches(
            EmbedChunk, fn_constructor_args=(shared, weights, embedding), **on_cpu
        )
        return _without_order(embedded)
    decoded = read.map_batches(DecodeChunk, fn_constructor_args=(shared, embedding), **on_cpu)
    encoded = decoded.map_batches(
        EncodeChunk,
        fn_constructor_args=(weights, embedding),
        batch_size=None,
        zero_copy_batch=True,
        compute=ActorPoolStrategy(size=pools.num_gpu_actors),
        num_cpus=pools.cpus_each_gpu_actor,
        num_gpus=1,
    )
    return _without_order(encoded)


def _without_order(dataset: Dataset) -> Dataset:
    dataset.context.execution_options = ExecutionOptions(preserve_order=False)
    bound_execution(dataset.context)
    return dataset


def quiet() -> None:
    """Keep the progress bars and logs of Ray Data off the terminal."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


class DecodeChunk:
    """An actor that reads and decodes images; their pixels go to the object store of its node."""

    def __init__(self, shared: Any, embedding: EmbeddingSpec) -> None:
        cv2.setNumThreads(1)  # an actor has one CPU
        self._source, self._chunks = ray.get(shared)
        self._embedding = embedding

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Decode the chunk with the number in the batch."""
        number = int(batch[_NUMBER][0])
        rows = self._chunks.rows_of(number)
        pixels, flaws = read_pixels(self._source, rows, self._embedding)
        return {_PLACE: self._chunks.positions_of(number), _PIXELS: pixels, _FLAW: flaws}


class EncodeChunk:
    """An actor that computes features from pixels, on its GPU or its CPU."""

    def __init__(self, weights: Any, embedding: EmbeddingSpec) -> None:
        on_gpu = bool(ray.get_gpu_ids())
        torch.set_num_threads(1)
        # The actor's node may not have access to the encoder file.
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(ray.get(weights))
            file.flush()
            self._encode = EncoderRunner(
                embedding._replace(encoder=file.name),
                device=torch.device("cuda" if on_gpu else "cpu"),
                name=embedding.encoder,
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Replace the pixels of a chunk by its features."""
        features = self._encode(batch[_PIXELS])
        return {_PLACE: batch[_PLACE], _FEATURES: features, _FLAW: batch[_FLAW]}


class EmbedChunk:
    """An actor that decodes images and computes their features, on one CPU."""

    def __init__(self, shared: Any, weights: Any, embedding: EmbeddingSpec) -> None:
        self._decode = DecodeChunk(shared, embedding)
        self._encode = EncodeChunk(weights, embedding)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embed the chunk with the number in the batch."""
        return self._encode(self._decode(batch))


def plan_pools(num_workers: int | None, *, max_actors: int) -> Pools:
    """Choose the number of actors and their CPUs from the free CPUs and GPUs of the cluster.

    Args:
        num_workers: Number of actors on CPUs; None starts one per free CPU.
        max_actors: Largest useful number of actors on CPUs: the number of chunks.

    Raises:
        ClusterError: If the actors do not fit: Ray Data would wait forever without a message.
    """
    cpus, gpus = _free_resources()
    # The read task takes part of a CPU on one of the nodes; leave that much free on each of them.
    cpus = np.maximum(cpus - (READ_CPUS + _MARGIN), 0.0)
    with_gpu = gpus > 0
    gpu_actor_cpus = 0.0
    if with_gpu.any():
        # At most half of a node's CPUs: the other half decodes.
        half = float((cpus[with_gpu] / (2 * gpus[with_gpu])).min())
        # Rounded down to hundredths, so that the actors fit in spite of rounding errors.
        gpu_actor_cpus = math.floor(100 * min(_GPU_ACTOR_CPUS, half)) / 100
    free_cpus = cpus - gpus * gpu_actor_cpus
    node_actors = np.where(free_cpus > _MIN_ACTOR_CPUS, np.maximum(1, np.round(free_cpus)), 0)
    num_actors = min(num_workers or int(node_actors.sum()), max_actors)
    cpus_each = _largest_share(free_cpus, num_actors)
    if not num_actors or cpus_each < _MIN_ACTOR_CPUS:
        total = ray.cluster_resources().get("CPU", 0.0)
        raise ClusterError(
            f"{max(1, num_actors)} embedding worker(s) do not fit: {free_cpus.sum():.2f} of the "
            f"cluster's {total:g} CPUs are free on {len(cpus)} node(s). Wait for the other work to "
            f"end, lower num_workers, or add nodes"
        )
    return Pools(num_actors, cpus_each, int(gpus.sum()), gpu_actor_cpus)


def _largest_share(cpus: npt.NDArray[np.float64], count: int) -> float:
    """Return the largest share of a CPU, at most 1, at which ``count`` actors fit on the nodes."""
    if not count:
        return 0.0
    for hundredths in range(100, 0, -1):
        if np.floor(100 * cpus / hundredths + 1e-6).sum() >= count:
            return hundredths / 100
    return 0.0


def _free_resources() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the free CPUs and GPUs of each node, after waiting for earlier work to end.

    Raises:
        ClusterError: If no CPU becomes free within a minute.
    """
    began = time.monotonic()
    total = ray.cluster_resources()
    while True:
        nodes = list(available_resources_per_node().values())
        cpus = np.array([node.get("CPU", 0.0) for node in nodes], dtype=np.float64)
        gpus = np.array([int(node.get("GPU", 0.0)) for node in nodes], dtype=np.int64)
        waited = time.monotonic() - began
        all_free = cpus.sum() >= total.get("CPU", 0.0) and gpus.sum() >= total.get("GPU", 0.0)
        enough = cpus.max(initial=0.0) >= READ_CPUS + _MARGIN + 2 * _MIN_ACTOR_CPUS
        if all_free or (enough and waited > _SETTLE_S):
            return cpus, gpus
        if waited > _FREE_WITHIN_S:
            raise ClusterError(
                f"embedding needs a CPU; {cpus.sum():g} of the cluster's {total.get('CPU', 0.0):g} "
                f"are free. Wait for the other work to end, or add nodes"
            )
        time.sleep(_POLL_S)
