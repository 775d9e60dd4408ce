"""A folder of given embeddings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.embed.embeddings import Embeddings
from raysl.embed.shards import ShardPlan, ShardRows, embeddings_folder, write_shard


@pytest.fixture
def write_embeddings() -> Callable[..., Embeddings]:
    """Write features as `raysl embed` does; every third row of the source was bad."""

    def write(
        out: Path,
        features: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        shard_rows: int = 7,
        **more: Any,
    ) -> Embeddings:
        folder = embeddings_folder(str(out))
        folder.create()
        plan = ShardPlan(len(features), shard_rows)
        rows = np.array([row for row in range(2 * len(features)) if row % 3 != 2])[: len(features)]
        for shard in range(plan.num_shards):
            start, stop = plan.bounds(shard)
            content = ShardRows(
                [f"{row}.png" for row in rows[start:stop]],
                rows[start:stop],
                None if labels is None else labels[start:stop],
                features[start:stop],
            )
            write_shard(
                folder,
                plan.name(shard),
                content,
                class_names=["a", "b"],
                store="float32",
                about={},
                bad=[],
            )
        folder.write_claim(
            {"embed_dim": features.shape[1], "images": len(features), "class_names": ["a", "b"]}
        )
        return Embeddings(str(out), **more)

    return write
