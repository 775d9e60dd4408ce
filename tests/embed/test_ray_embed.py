"""Embedding on Ray gives what embedding in this process gives, whatever happens to its actors."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raysl.embed import ray_embed as module
from raysl.embed.ray_embed import features_on_ray, plan_pools, stream_on_ray
from raysl.errors import ClusterError, DivergedError
from raysl.evaluate import embedding as jobs
from raysl.evaluate.embedding import EmbeddingSpec, cut_rows, features_here
from raysl.sources.folder import FolderSource
from raysl.sources.open import open_source
from raysl.sources.source import DataConfig, Source

pytestmark = pytest.mark.ray

# Actors do not see the tests' modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Fragile:
    """A source whose first reader is killed."""

    def __init__(self, source: Source, mark: Path) -> None:
        self.source, self.mark, self.name = source, mark, source.name
        self.fingerprint = source.fingerprint

    def labels(self) -> Any:
        return self.source.labels()

    def decoding(self, index: int) -> Any:
        return self.source.decoding(index)

    def read(self, indices: Any) -> Any:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(indices)


@pytest.fixture
def source(photos: Path) -> Source:
    config = DataConfig(source=str(photos))
    return open_source(config, data=config)


@pytest.mark.usefixtures("ray_cluster")
class TestFeaturesOnRay:
    def test_are_those_of_one_thread_though_there_are_two_actors_and_one_is_killed(
        self,
        source: Source,
        tiny_encoder: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(jobs, "_MOST_IMAGES", 8)
        rows = np.random.default_rng(0).permutation(101)
        rows = np.append(rows, rows[:2])
        embedding = EmbeddingSpec(str(tiny_encoder()), 16)
        counted: list[int] = []
        fragile: Any = Fragile(source, tmp_path / "killed")
        features, bad = features_on_ray(
            fragile, rows, embedding, advance=counted.append, num_workers=2
        )
        assert (tmp_path / "killed").exists()
        wanted, wanted_bad = features_here(source, rows, embedding, num_threads=1)
        assert np.array_equal(features, wanted)  # to the bit: chunks and threads are the same
        assert bad == wanted_bad
        assert len(bad) == 1
        assert sum(counted) == len(rows)

    def test_a_stream_that_is_left_gives_its_cpus_back(
        self, source: Source, tiny_encoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jobs, "_MOST_IMAGES", 4)
        chunks = cut_rows(np.arange(101), size_px=16)
        embedding = EmbeddingSpec(str(tiny_encoder()), 16)
        stream = stream_on_ray(source, chunks, embedding, num_workers=1)
        next(iter(stream))
        stream.close()
        assert plan_pools(None, max_actors=100).num_cpu_actors == 4

    def test_errors_are_raysls_own(
        self, source: Source, tiny_encoder: Callable[..., Path], photos: Path
    ) -> None:
        path = tiny_encoder(std=[1e-45, 1e-45, 1e-45])
        with pytest.raises(DivergedError, match="features that are not finite") as caught:
            features_on_ray(source, np.arange(3), EmbeddingSpec(str(path), 16), num_workers=1)
        assert str(path) in str(caught.value)  # and not the copy that the actor has
        assert isinstance(source, FolderSource)
        (photos / "class1" / "001.png").unlink()
        rows = np.array([row for row in range(101) if source.where(row).endswith("001.png")])
        good = EmbeddingSpec(str(tiny_encoder("good")), 16)
        _, bad = features_on_ray(source, rows, good, num_workers=1)
        assert len(bad) == 1  # a file that is gone is one bad image


class TestPlanPools:
    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def set_free(cpus: list[float], gpus: list[int]) -> None:
            found = np.array(cpus), np.array(gpus, dtype=np.int64)
            monkeypatch.setattr(module, "_free_resources", lambda: found)
            monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"CPU": sum(cpus)})

        return set_free

    @pytest.mark.parametrize(
        ("cpus", "gpus", "actors"),
        [
            ([2.0], [0], 2),
            ([4.0, 4.0, 1.0], [0, 0, 0], 9),
            ([0.5, 0.5], [0, 0], 2),
            ([16.0], [1], 16),
            ([8.0, 64.0], [8, 0], 68),
            ([1.0], [1], 1),
        ],
    )
    def test_everything_fits_on_the_nodes(
        self, cpus: list[float], gpus: list[int], actors: int, free: Callable[..., None]
    ) -> None:
        free(cpus, gpus)
        pools = plan_pools(None, max_actors=10**6)
        assert pools.num_gpu_actors == sum(gpus)
        assert pools.num_cpu_actors == pytest.approx(actors, abs=1)
        left = [
            int((cpu - 0.01 - gpu * pools.cpus_each_gpu_actor) / pools.cpus_each)
            for cpu, gpu in zip(cpus, gpus, strict=True)
        ]
        assert sum(left) >= pools.num_cpu_actors

    def test_no_more_than_there_is_work_for(self, free: Callable[..., None]) -> None:
        free([64.0], [0])
        assert plan_pools(None, max_actors=3).num_cpu_actors == 3

    def test_what_cannot_fit_is_refused(self, free: Callable[..., None]) -> None:
        free([1.0], [0])
        with pytest.raises(ClusterError, match=r"1000 embedding worker\(s\) do not fit"):
            plan_pools(1000, max_actors=10**6)
