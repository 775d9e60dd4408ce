"""Estimate the cost of embedding very many images from measured rates."""

from typing import NamedTuple

_ROW_BYTES = 40  # id, row and label, about
_KEPT_CHUNKS = 2  # that an actor has waiting
_FLOAT32 = 4
_CHANNELS = 3
_DAY_S = 86_400


class EmbeddingCosts(NamedTuple):
    """The measured costs that a plan is computed from."""

    num_images: int
    embed_dim: int
    bytes_per_feature: int
    """4, or 2 with store=float16."""
    image_bytes: float
    """Encoded, of the source."""
    size_px: int
    chunk_images: int
    images_per_s_per_worker: float
    """Measured: of one actor on a CPU that does everything, or of one GPU."""
    num_workers: int
    """GPUs, or CPUs without GPUs."""
    decode_images_per_s_per_cpu: float
    """Measured: reading and decoding alone, on one core."""
    multiplications_per_s: float
    """Measured: of float32 matrix products on one worker (a multiplication and an addition)."""
    shard_bytes: int


class PlanLine(NamedTuple):
    """One quantity of the plan, with its formula."""

    what: str
    formula: str
    value: float
    unit: str


def plan_embedding(given: EmbeddingCosts) -> list[PlanLine]:
    """Return what it takes, each with the formula that it follows from.

    M images, D features of b bytes, G workers at r images/s each, c images a chunk, S pixels a
    side, f multiplications/s a worker.
    """
    m, dim, width = given.num_images, given.embed_dim, given.bytes_per_feature
    total_rate = given.num_workers * given.images_per_s_per_worker
    features = float(m) * dim * width
    storage = features + float(m) * _ROW_BYTES
    in_flight = given.num_workers * _KEPT_CHUNKS * given.chunk_images
    store = in_flight * (_CHANNELS * given.size_px**2 + dim * _FLOAT32)
    search_s = float(m) * m * dim / (given.num_workers * given.multiplications_per_s)
    query_s = float(m) * dim / (given.num_workers * given.multiplications_per_s)
    return [
        PlanLine("features", f"M (D b + {_ROW_BYTES})", storage, "bytes"),
        PlanLine("shards", "M D b / shard_mib", max(1.0, features / given.shard_bytes), "files"),
        PlanLine("time", "M / (G r)", m / total_rate, "s"),
        PlanLine("worker days", "M / r", m / given.images_per_s_per_worker / _DAY_S, "days"),
        PlanLine(
            "read from the source", "G r image bytes", total_rate * given.image_bytes, "bytes/s"
        ),
        PlanLine(
            "CPUs that decode", "G r / d", total_rate / given.decode_images_per_s_per_cpu, "CPUs"
        ),
        PlanLine(
            "object store of all nodes",
            f"{_KEPT_CHUNKS} G c (3 S^2 + {_FLOAT32} D)",
            store,
            "bytes",
        ),
        PlanLine(
            "features to the writing process", "4 G r D", total_rate * dim * _FLOAT32, "bytes/s"
        ),
        PlanLine("one query, exact", "M D / (G f)", query_s, "s"),
        PlanLine("all against all, exact", "M^2 D / (G f)", search_s, "s"),
    ]
