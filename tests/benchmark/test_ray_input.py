"""The stream is measured as training has it, and what goes wrong is told."""

import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raysl.augment.pipeline import View
from raysl.benchmark import ray_input as benchmark_input
from raysl.benchmark.ray_input import (
    cores_of,
    input_layout,
    share_source,
    spilled_bytes,
    steps_needed,
    stream,
    stream_task,
)
from raysl.config.load import read_mapping
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.errors import ClusterError, DecodeError
from raysl.run.ray_cluster import Layout
from raysl.run.recipe import run_from_values
from raysl.sources.source import ArraySource, BadImagesConfig

pytestmark = pytest.mark.ray

MAKING = BlockSpec((View(count=2, size_px=16),))
TWO = Layout(0, 0.0, 2, 0.9, False, 1, 1)
ALL = Layout(0, 0.0, 4, 0.99, False, 1, 1)


def source() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (50, 20, 24, 3), dtype=np.uint8)
    return ArraySource("made up", images)


def plan(num_steps: int) -> Plan:
    return Plan([50], seed=3, global_batch_size=8, item_size=4, num_steps=num_steps)


class TestTask:
    @pytest.mark.parametrize(("workers", "round_batches"), [(1, 1), (2, 1), (3, 2), (16, 8)])
    def test_counts_whole_rounds_of_all_workers(self, workers: int, round_batches: int) -> None:
        layout = TWO._replace(num_data_workers=workers)
        task = stream_task(plan(10), MAKING, layout=layout, num_consumers=4, prefetch=2, images=999)
        assert task.round_batches == round_batches
        assert task.num_batches % round_batches == 0
        assert task.num_batches * 8 >= 999
        assert task.batch_size == 2
        assert steps_needed(task) > task.num_batches + round_batches


class TestStream:
    @pytest.mark.usefixtures("ray_cluster")
    def test_what_a_data_worker_raises_is_raised_here_as_it_was(self) -> None:
        task = stream_task(plan(10), MAKING, layout=TWO, num_consumers=1, prefetch=2, images=10)
        broken = source()
        broken.images = [b"no image"] * 50  # type: ignore[assignment]
        strict = replace(MAKING, bad_images=BadImagesConfig(policy="fail"))
        with pytest.raises(DecodeError, match=r"^made up image \d+ "):
            stream(share_source(broken), plan(20), strict, layout=TWO, task=task)

    @pytest.mark.usefixtures("ray_cluster")
    def test_a_cluster_in_use_is_told_and_not_waited_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray

        class Holder:
            def hold(self) -> None:
                """Return once the CPUs are taken."""

        benchmark_input.wait_for_cpus(ALL)  # of the test before
        monkeypatch.setattr(benchmark_input, "_FREE_WITHIN_S", 0.5)
        holder = ray.remote(Holder).options(num_cpus=3).remote()
        ray.get(holder.hold.remote())
        task = stream_task(plan(10), MAKING, layout=TWO, num_consumers=1, prefetch=2, images=10)
        try:
            with pytest.raises(ClusterError, match=r"needs 1.81 CPUs; 1 of the cluster's 4"):
                stream(share_source(source()), plan(20), MAKING, layout=TWO, task=task)
        finally:
            ray.kill(holder)


class TestCluster:
    @pytest.mark.usefixtures("ray_cluster")
    def test_data_workers_take_every_cpu_unless_told_otherwise(self, run_yaml: Any) -> None:
        values = {"name": "x", **read_mapping(run_yaml("x"))}
        values["cluster"] = {}
        layout = input_layout(run_from_values(values, where="test"))
        assert layout.num_data_workers == cores_of(layout) == 4
        assert layout.num_data_workers * layout.cpus_per_data_worker < 4
        values["cluster"] = {"num_data_workers": 2}
        layout = input_layout(run_from_values(values, where="test"))
        assert layout.num_data_workers == cores_of(layout) == 2
        values["cluster"] = {"num_data_workers": 1000}
        with pytest.raises(ClusterError, match="1000 data workers do not fit"):
            input_layout(run_from_values(values, where="test"))

    @pytest.mark.usefixtures("ray_cluster")
    def test_says_what_was_spilled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert spilled_bytes() == 0  # asks Ray, whose text says nothing before it spills
        text = "Spilled 123 MiB, 4 objects, avg write throughput 567 MiB/s\n"
        answer = subprocess.CompletedProcess([], 0, stdout=text)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
        assert spilled_bytes() == 123 << 20
