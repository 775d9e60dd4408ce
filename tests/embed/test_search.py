"""Exact search, against brute force; ties; what is near whom."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from raysl.embed import search as module
from raysl.embed.embeddings import Embeddings
from raysl.embed.search import Neighbors, nearest, neighbors_of_all, search
from raysl.errors import DataError, ShapeError

Write = Callable[..., Embeddings]
CPU = torch.device("cpu")


def brute(directions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """One similarity at a time, in float64."""
    count = len(directions)
    similarity = np.array(
        [[-2.0 if i == j else float(directions[i] @ directions[j]) for j in range(count)]
         for i in range(count)]
    )  # fmt: skip
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, axis=1), order


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(61, 5)).astype(np.float32)


class TestNeighborsOfAll:
    @pytest.mark.parametrize("block", [1, 8, 4096])
    @pytest.mark.parametrize("center", [False, True])
    def test_are_those_of_brute_force_whatever_the_blocks(
        self,
        block: int,
        center: bool,
        features: np.ndarray,
        tmp_path: Path,
        write_embeddings: Write,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(module, "_BLOCK_ROWS", block)
        monkeypatch.setattr(module, "_BLOCK_QUERIES", 2 * block)
        embeddings = write_embeddings(
            tmp_path / "out", features + 1, center=center, cache_bytes=200
        )
        shifted = features.astype(np.float64) + (0 if center else 1)
        shifted -= shifted.mean(axis=0) if center else 0
        wanted, order = brute(shifted / np.linalg.norm(shifted, axis=1, keepdims=True), 9)
        parts = list(neighbors_of_all(embeddings, k=9, device=CPU))
        assert sum(len(found.positions) for _, found in parts) == 61
        found = Neighbors(
            *(torch.cat([getattr(p, f) for _, p in parts]) for f in Neighbors._fields)
        )
        assert np.abs(found.similarities.numpy() - wanted).max() < 1e-5
        assert (found.positions.numpy() == order).mean() > 0.99  # but for ties to rounding

    def test_of_equal_ones_the_first_come_first(
        self,
        features: np.ndarray,
        tmp_path: Path,
        write_embeddings: Write,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(module, "_BLOCK_ROWS", 8)
        same = np.zeros((40, 5), dtype=np.float32)
        same[:, 0] = 2.0
        same[10] = [0, 3, 0, 0, 0]
        embeddings = write_embeddings(tmp_path / "out", same)
        (start, found), *_ = neighbors_of_all(embeddings, k=3, device=CPU)
        assert start == 0
        assert found.positions[0].tolist() == [1, 2, 3]
        assert found.positions[2].tolist() == [0, 1, 3]
        assert found.positions[10].tolist() == [0, 1, 2]

    def test_fewer_than_k_are_minus_one(
        self, features: np.ndarray, tmp_path: Path, write_embeddings: Write
    ) -> None:
        embeddings = write_embeddings(tmp_path / "out", features[:3])
        ((_, found),) = neighbors_of_all(embeddings, k=5, device=CPU)
        assert found.positions[:, 2:].eq(-1).all()
        assert found.positions[:, :2].ge(0).all()
        assert found.similarities[:, 2:].eq(float("-inf")).all()

    def test_a_zero_vector_is_near_nothing(self, tmp_path: Path, write_embeddings: Write) -> None:
        some = np.eye(4, dtype=np.float32)
        some[3] = 0
        ((_, found),) = neighbors_of_all(write_embeddings(tmp_path / "out", some), k=3, device=CPU)
        assert found.similarities.isfinite().all()
        assert found.similarities[3].eq(0).all()


class TestNearest:
    def test_negative_similarities_are_ordered_too(self) -> None:
        angles = torch.linspace(0, 3.1, 12)
        block = torch.stack([angles.cos(), angles.sin()], dim=1)
        found = nearest(torch.tensor([[1.0, 0.0]]), [(5, block)], k=12)
        assert found.positions[0].tolist() == list(range(5, 17))

    def test_other_widths_are_refused(self) -> None:
        with pytest.raises(ShapeError, match="queries have 3 features, the embeddings 4"):
            nearest(torch.ones(1, 3), [(0, torch.ones(2, 4))], k=1)

    def test_search_by_a_query_finds_it(
        self, features: np.ndarray, tmp_path: Path, write_embeddings: Write
    ) -> None:
        embeddings = write_embeddings(tmp_path / "out", features)
        queries = embeddings.to_directions(torch.from_numpy(3 * features[[4, 50]]))
        found = search(embeddings, queries, k=2, device=CPU)
        assert found.positions[:, 0].tolist() == [4, 50]
        assert found.similarities[:, 0].numpy() == pytest.approx(1.0, abs=1e-6)


class TestEmbeddings:
    def test_rows_names_and_labels_of_places(
        self, features: np.ndarray, tmp_path: Path, write_embeddings: Write
    ) -> None:
        labels = np.arange(61) % 3 - 1
        embeddings = write_embeddings(tmp_path / "out", features, labels=labels)
        assert embeddings.rows[:4].tolist() == [0, 1, 3, 4]
        assert embeddings.ids(np.array([60, 2])) == [f"{embeddings.rows[60]}.png", "3.png"]
        assert [embeddings.label_name(place) for place in range(3)] == [None, "a", "b"]
        assert embeddings.positions_of([3, 0]).tolist() == [2, 0]
        with pytest.raises(DataError, match="row 2 has no features"):
            embeddings.positions_of([0, 2])

    def test_a_missing_shard_is_noticed(
        self, features: np.ndarray, tmp_path: Path, write_embeddings: Write
    ) -> None:
        write_embeddings(tmp_path / "out", features)
        next((tmp_path / "out").glob("features-000003*")).unlink()
        with pytest.raises(DataError, match="holds 54 images; 61 were embedded"):
            Embeddings(str(tmp_path / "out"))

    def test_a_folder_without_any_is_refused(self, tmp_path: Path, write_embeddings: Write) -> None:
        with pytest.raises(DataError, match="holds no embeddings; `raysl embed"):
            Embeddings(str(tmp_path))
