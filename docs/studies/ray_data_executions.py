"""Measure what an execution of Ray Data carries, with data workers that only move bytes.

    python docs/studies/ray_data_executions.py --most-ranks 2 1 --ranks 2 --block-mib 32

Opens the stream of a run as training does, for each largest size of a group of ranks in turns, and
prints for each the blocks and MiB per second, and the CPU seconds per block of each process: the
coordinators of the executions, the train workers, which drop what they get, and the data workers.
On few cores the CPU seconds are what counts; all processes share the cores.

    python docs/studies/ray_data_executions.py --arithmetic

Runs, without a cluster, what the AutoscalingCoordinator of Ray Data computes for all executions.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    _AutoscalingCoordinatorActor,
)

from raysl.augment.crop import Crop
from raysl.augment.pipeline import View
from raysl.data.block import INDEX, Block
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.embed.ray_embed import quiet
from raysl.run import ray_data
from raysl.run.ray_cluster import ClusterNeeds, connect, disconnect
from raysl.run.ray_data import RemainingDataset, iterate_shard
from raysl.run.ray_streams import StreamConfig

RUN = "study"
ROWS = 16  # images of a block
WARM_UP = 5  # blocks of each rank before the measurement
SPARE = 50  # and after it, so that no data worker is idle
MIB = 1 << 20
KINDS = {
    "SplitCoordinator": "coordinator",
    "Consumer": "train worker",
    "MoveBytes": "data worker",
}


class MoveBytes:
    """A data worker that returns the same bytes for each block."""

    def __init__(self, block_bytes: int, *_: Any) -> None:
        pixels = np.zeros((ROWS, block_bytes // ROWS), dtype=np.uint8)
        self._block = {INDEX: np.arange(ROWS), "views_0": pixels}

    def __call__(self, _: dict[str, np.ndarray]) -> Block:
        """Return a block."""
        return self._block


class Consumer:
    """A train worker that drops its batches."""

    def open(self, shard: Any) -> None:
        """Open the stream."""
        self._batches: Iterator[Block] = iterate_shard(
            lambda: shard, batch_size=ROWS, prefetch_batches=2
        )

    def take(self, blocks: int) -> None:
        """Take so many blocks."""
        for _ in range(blocks):
            next(self._batches)


class Measured(NamedTuple):
    """What one stream carried."""

    first_block_s: float
    blocks_per_s: float
    cpu_ms_per_block: dict[str, list[float]]
    """Of each process, by kind. A block counts for the execution that it passes through."""


def measure(options: argparse.Namespace, most_ranks: int) -> Measured:
    """Open a stream with groups of so many ranks, and take its blocks."""
    count, ranks = options.blocks, options.ranks
    block_bytes = int(options.block_mib * MIB)
    ray_data.MakeItems = MoveBytes  # type: ignore[assignment, misc]
    steps = options.steps or count + WARM_UP + SPARE
    plan = Plan([10**6], seed=0, global_batch_size=ranks, item_size=1, num_steps=steps)
    spec = BlockSpec((View(count=1, size_px=6000, crop=Crop()),))  # too large to be packed
    needs = ClusterNeeds((ranks,), "cpu", None, options.data_workers, 1)
    remaining = RemainingDataset(block_bytes, plan, spec, newest_step=lambda: 0, needs=needs)
    remaining.most_ranks = most_ranks
    began = time.perf_counter()
    here = ray.get_runtime_context().get_node_id()
    streams = remaining()
    opened = StreamConfig(RUN).configure({"train": streams}, ranks, None, [here] * ranks)
    shards: list[Any] = [shard["train"] for shard in opened]
    consumers = [ray.remote(num_cpus=0)(Consumer).remote() for _ in shards]  # type: ignore[attr-defined]
    ray.get([c.open.remote(shard) for c, shard in zip(consumers, shards, strict=True)])
    ray.get([consumer.take.remote(1) for consumer in consumers])
    first_block_s = time.perf_counter() - began
    ray.get([consumer.take.remote(WARM_UP - 1) for consumer in consumers])
    while sum(kind == "data worker" for kind, _ in _cpu_seconds().values()) < options.data_workers:
        time.sleep(0.2)
    before, began = _cpu_seconds(), time.perf_counter()
    ray.get([consumer.take.remote(count) for consumer in consumers])
    seconds, after = time.perf_counter() - began, _cpu_seconds()
    blocks = {
        "coordinator": count * ranks / len(streams),
        "train worker": count,
        "data worker": count * ranks / options.data_workers,
    }
    cpu: dict[str, list[float]] = {kind: [] for kind in blocks}
    for pid, (kind, total) in after.items():
        cpu[kind].append(1e3 * (total - before[pid][1]) / blocks[kind])
    coordinators = {shard._coord_actor for shard in shards}
    ray.get([each.shutdown_executor.remote() for each in coordinators])
    for actor in [*consumers, *coordinators]:
        ray.kill(actor)
    while _cpu_seconds():
        time.sleep(0.2)
    return Measured(first_block_s, count * ranks / seconds, cpu)


def _cpu_seconds() -> dict[int, tuple[str, float]]:
    """Return kind and CPU seconds of each process of a stream, by process number."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    found = {}
    for actor in ray._private.state.actors(job_id=job).values():
        kinds = [kind for name, kind in KINDS.items() if name in actor["ActorClassName"]]
        if kinds and actor["State"] == "ALIVE":
            with suppress(psutil.NoSuchProcess):
                times = psutil.Process(actor["Pid"]).cpu_times()
                found[actor["Pid"]] = kinds[0], times.user + times.system
    return found


def arithmetic(executions: int, nodes: int = 64) -> None:
    """Run what Ray Data's AutoscalingCoordinator computes for executions on nodes of 31 CPUs."""
    alive = [
        {
            **{"NodeID": f"{number:056x}", "Alive": True, "Labels": {}},
            "Resources": {"CPU": 31.0, "GPU": 4.0, "object_store_memory": 1e11},
        }
        for number in range(nodes)
    ]
    kinds = ["CPU", "GPU", "memory", "object_store_memory"]
    coordinator = _AutoscalingCoordinatorActor(
        send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: alive
    )
    shares = []
    for bundles in ([], [{"CPU": 0.98}] * (nodes * 27 // executions)):
        began = time.process_time()
        for number in range(executions):
            coordinator.request_resources(f"data-{number}", bundles, 180.0, kinds)
        seconds = (time.process_time() - began) / executions
        reserved = coordinator.get_reserved_resources("data-0").values()
        shares.append([sum(r.get(k, 0.0) for r in reserved) for k in (kinds[0], kinds[-1])])
    print(
        f"{executions} executions on {nodes} nodes: {1e3 * seconds:.0f} ms of CPU for a request; "
        f"share of one before it asked for its data workers {shares[0][0]:g} CPUs and "
        f"{shares[0][1] / 1e9:.0f} GB of object store, then {shares[1][0]:g} and "
        f"{shares[1][1] / 1e9:.0f}"
    )


def main() -> None:
    """Measure all sizes of a group in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most-ranks", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data-workers", type=int, default=2)
    parser.add_argument("--block-mib", type=float, default=32.0)
    parser.add_argument("--blocks", type=int, default=150, help="of each rank")
    parser.add_argument("--steps", type=int, help="of the whole plan, if it shall be longer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arithmetic", action="store_true")
    options = parser.parse_args()
    if options.arithmetic:
        for executions in (1, 8, 16, 32, 64):
            arithmetic(executions)
        return
    quiet()
    connect()
    results: dict[int, list[Measured]] = {most: [] for most in options.most_ranks}
    for _ in range(options.rounds):
        for most_ranks, measured in results.items():
            measured.append(measure(options, most_ranks))
            _print(most_ranks, measured[-1:], options)
    print("medians:")
    for most_ranks, measured in results.items():
        _print(most_ranks, measured, options)
    disconnect()


def _print(most_ranks: int, measured: list[Measured], options: argparse.Namespace) -> None:
    rate = statistics.median(each.blocks_per_s for each in measured)
    first = statistics.median(each.first_block_s for each in measured)
    cpu = {
        kind: sorted(ms for each in measured for ms in each.cpu_ms_per_block[kind])
        for kind in KINDS.values()
    }
    shown = ", ".join(
        f"{kind} {statistics.median(ms):.1f} ({ms[0]:.1f} to {ms[-1]:.1f})"
        for kind, ms in cpu.items()
        if ms
    )
    print(
        f"groups of {most_ranks} ranks: first block after {first:.1f} s, {rate:.0f} blocks/s, "
        f"{rate * options.block_mib:,.0f} MiB/s; CPU ms per block: {shown}",
        flush=True,
    )


if __name__ == "__main__":
    main()
