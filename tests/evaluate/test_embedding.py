"""Features of a source: those of the plain module on the images that evaluation sees."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.encoder.file import load_encoder
from raysl.errors import DataError, DivergedError
from raysl.evaluate import embedding as module
from raysl.evaluate.embedding import (
    Chunk,
    EmbeddingSpec,
    collect,
    cut_rows,
    features_here,
    images_per_chunk,
)
from raysl.evaluate.features import EvalImages
from raysl.sources.open import open_source
from raysl.sources.source import ArraySource, DataConfig, Source

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def open_photos(photos: Path) -> Source:
    config = DataConfig(source=str(photos))
    return open_source(config, data=config)


def plain_features(path: Path, source: Source, rows: np.ndarray, **settings: Any) -> np.ndarray:
    """Image by image, in float64."""
    network = load_encoder(path).double()
    values = {"size_px": 16, "crop_fraction": 1.0, **settings}
    images = EvalImages(source, rows, np.zeros(len(rows), dtype=np.int64), num_threads=1, **values)
    found = []
    for batch in images.batches(np.arange(len(rows))):
        for image in batch:
            pixels = (image / 255 - np.array(MEAN)) / np.array(STD)
            with torch.no_grad():
                found.append(network(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].numpy())
    return np.stack(found)


class TestFeaturesHere:
    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("chunk", [1, 7, 256])
    def test_are_the_plain_modules_in_the_order_of_the_rows_whatever_the_chunks(
        self,
        chunk: int,
        threads: int,
        tiny_encoder: Callable[..., Path],
        photos: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path, source = tiny_encoder(), open_photos(photos)
        rows = np.random.default_rng(0).permutation(101)[:45]
        rows = np.append(rows, rows[:3])  # a row may come twice
        monkeypatch.setattr(module, "_MOST_IMAGES", chunk)
        counted: list[int] = []
        features, bad = features_here(
            source, rows, EmbeddingSpec(str(path), 16), num_threads=threads, advance=counted.append
        )
        assert features.dtype == np.float32
        assert np.abs(features - plain_features(path, source, rows)).max() < 1e-5
        assert sum(counted) == len(rows)
        broken = next(row for row in range(101) if source.where(row).endswith("broken.png"))
        assert set(bad) == ({broken} & set(rows.tolist()))

    def test_crop_and_size_are_those_of_evaluation(
        self, tiny_encoder: Callable[..., Path], photos: Path
    ) -> None:
        path, source, rows = tiny_encoder(), open_photos(photos), np.arange(10)
        wanted = plain_features(path, source, rows, size_px=12, crop_fraction=0.8)
        features, _ = features_here(source, rows, EmbeddingSpec(str(path), 12, 0.8), num_threads=1)
        assert np.abs(features - wanted).max() < 1e-5

    def test_a_bad_image_counts_as_a_black_one(
        self, tiny_encoder: Callable[..., Path], photos: Path
    ) -> None:
        source = open_photos(photos)
        broken = next(row for row in range(101) if source.where(row).endswith("broken.png"))
        embedding = EmbeddingSpec(str(tiny_encoder()), 16)
        features, bad = features_here(source, np.array([broken]), embedding, num_threads=1)
        black = ArraySource("black", np.zeros((1, 16, 16, 3), dtype=np.uint8))
        assert np.array_equal(
            features, features_here(black, np.array([0]), embedding, num_threads=1)[0]
        )
        assert bad == {broken: "not an image of a known format"}

    def test_bf16_is_near_float32_and_leaves_float32(
        self, tiny_encoder: Callable[..., Path], photos: Path
    ) -> None:
        path, source, rows = str(tiny_encoder()), open_photos(photos), np.arange(8)
        exact, _ = features_here(source, rows, EmbeddingSpec(path, 16), num_threads=1)
        rough, _ = features_here(source, rows, EmbeddingSpec(path, 16, 1.0, "bf16"), num_threads=1)
        assert rough.dtype == np.float32
        assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()

    def test_threads_of_torch_are_left_as_they_were(
        self, tiny_encoder: Callable[..., Path], photos: Path
    ) -> None:
        before = torch.get_num_threads()
        features_here(
            open_photos(photos), np.arange(3), EmbeddingSpec(str(tiny_encoder()), 16), num_threads=3
        )
        assert torch.get_num_threads() == before

    def test_no_rows_are_an_error(self, tiny_encoder: Callable[..., Path], photos: Path) -> None:
        with pytest.raises(DataError, match="no rows to embed"):
            features_here(
                open_photos(photos),
                np.empty(0, dtype=np.int64),
                EmbeddingSpec(str(tiny_encoder()), 16),
                num_threads=1,
            )

    def test_an_encoder_that_says_no_mean_is_refused(
        self, tiny_encoder: Callable[..., Path], photos: Path
    ) -> None:
        path = tiny_encoder(mean=None)
        with pytest.raises(DataError, match=r"its header has mean=None, not three numbers"):
            features_here(
                open_photos(photos), np.arange(3), EmbeddingSpec(str(path), 16), num_threads=1
            )

    def test_features_that_are_not_finite_end_it(
        self, tiny_encoder: Callable[..., Path], photos: Path
    ) -> None:
        path = tiny_encoder(std=[1e-45, 1e-45, 1e-45])
        with pytest.raises(DivergedError, match="features that are not finite"):
            features_here(
                open_photos(photos), np.arange(3), EmbeddingSpec(str(path), 16), num_threads=1
            )


class TestChunks:
    @pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
    def test_hold_each_row_exactly_once(self, count: int) -> None:
        rows = np.random.default_rng(0).permutation(5000)[:count]
        chunks = cut_rows(rows, size_px=32)
        assert np.concatenate([chunks.rows_of(n) for n in range(len(chunks))]).tolist() == (
            rows.tolist()
        )
        assert len(chunks.rows_of(len(chunks))) == len(chunks.rows_of(10**6)) == 0

    def test_get_smaller_as_images_get_larger_and_never_empty(self) -> None:
        sizes = [images_per_chunk(size) for size in (16, 32, 128, 224, 512, 8192)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == 256
        assert sizes[-1] == 1

    def test_come_back_in_any_order(self) -> None:
        chunks = cut_rows(np.arange(1000)[::-1].copy(), size_px=32)
        values = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)

        def made() -> Iterator[Chunk]:
            for number in reversed(range(len(chunks))):
                places = chunks.positions_of(number)
                flaws = np.zeros(len(places), dtype=np.uint8)
                flaws[places == 7] = 3
                yield Chunk(places, values[places], flaws)

        features, bad = collect(chunks, made())
        assert np.array_equal(features, values)
        assert list(bad) == [992]  # the row at place 7

    def test_one_that_is_missing_is_noticed(self) -> None:
        chunks = cut_rows(np.arange(300), size_px=32)
        one = Chunk(chunks.positions_of(0), np.zeros((256, 3), np.float32), np.zeros(256, np.uint8))
        with pytest.raises(DataError, match="256 of 300"):
            collect(chunks, iter([one]))
