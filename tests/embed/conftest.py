"""Folders of embeddings: of given features, and of images with planted copies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from raysl.cli import main
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


@pytest.fixture
def results_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a verb in this process and return the JSON object that it ends with."""

    def run(*words: str | Path) -> dict[str, Any]:
        assert main([*map(str, words), "--json"]) == 0
        results: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return results

    return run


class Embedded(NamedTuple):
    """Images, the encoder that embedded them, and their embeddings."""

    photos: Path
    encoder: Path
    out: Path


@pytest.fixture
def embedded(
    photos: Path, tiny_encoder: Callable[..., Path], results_of: Callable[..., dict[str, Any]]
) -> Embedded:
    """Embed 43 images: a resized, a re-encoded and a byte-for-byte copy are among them."""
    (photos / "class0" / "broken.png").unlink()
    for number in range(40, 100):
        (photos / f"class{number % 2}" / f"{number:03}.png").unlink()
    first = cv2.imread(str(photos / "class0" / "010.png"))
    big = cv2.resize(first, (240, 200), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(photos / "class0" / "z_big.jpg"), big, [cv2.IMWRITE_JPEG_QUALITY, 95])
    shutil.copy(photos / "class1" / "021.png", photos / "class0" / "z_copy.png")
    second = cv2.imread(str(photos / "class1" / "031.png"))
    cv2.imwrite(str(photos / "class1" / "z_again.jpg"), second, [cv2.IMWRITE_JPEG_QUALITY, 98])
    encoder, out = tiny_encoder(), photos.parent / "out"
    results_of("embed", photos, encoder.parent, out, "num_workers=0")
    return Embedded(photos, encoder, out)
