"""Measure a run's input on Ray: the data workers' function on all cores, and the stream."""

import math
import re
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysl.benchmark.throughput import Throughput, measure_batches
from raysl.benchmark.view_function import time_whole_items
from raysl.data.block import Block
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec, ItemMaker
from raysl.errors import ClusterError
from raysl.run.ray_cluster import READ_CPUS, Layout
from raysl.run.ray_data import (
    MakeItems,
    execution_options,
    iterate_shard,
    open_dataset,
    packing_for,
)
from raysl.run.ray_errors import own_errors

if TYPE_CHECKING:  # the recipe imports torch, which the actors below must not do
    from raysl.run.recipe import RunConfig

_MARGIN = 0.02  # CPUs that stay free
_SAMPLE_STORE_S = 0.5
_SAMPLE_PROCESSES_S = 0.2
# Listing a node's processes takes about 20 ms of the cores that are measured.
_LIST_PROCESSES_S = 5.0
_FREE_WITHIN_S = 60.0
_MIB = 1 << 20


class Stream(NamedTuple):
    """Speed and memory of the stream of views through Ray Data."""

    images_per_s: float
    """Sum over all consumers."""
    first_batch_s: float
    wait_s: float
    """Median time that a consumer waits for a batch."""
    wait_p99_s: float
    wait_share: float
    """Share of the consumers' time in which they wait."""
    bytes_per_image: float
    peak_object_store_bytes: int
    peak_driver_bytes: int
    peak_workers_bytes: int
    """Resident memory of all data workers, shared code and object store included."""
    peak_workers_private_bytes: int


def input_layout(config: "RunConfig[Any]") -> Layout:
    """Distribute the data workers over all CPUs of the connected cluster; no worker trains.

    Raises:
        ClusterError: If the data workers do not fit.
    """
    cpus = float(ray.cluster_resources().get("CPU", 0.0))
    workers = config.cluster.num_data_workers or max(1, math.floor(cpus))
    # Rounded down to hundredths, so that the workers fit in spite of rounding errors.
    worker_cpus = math.floor(100 * min(1.0, (cpus - READ_CPUS - _MARGIN) / workers)) / 100
    if worker_cpus < _MARGIN:
        raise ClusterError(
            f"{workers} data workers do not fit on the cluster's {cpus:g} CPUs; lower "
            f"cluster.num_data_workers or add nodes"
        )
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Layout(0, 0.0, workers, worker_cpus, False, 1, nodes)


def cores_of(layout: Layout) -> int:
    """Return the number of CPUs that make views."""
    return max(1, round(layout.num_data_workers * min(1.0, layout.cpus_per_data_worker + _MARGIN)))


def share_source(source: Any) -> Any:
    """Put a source into the object store, where all workers of a node share it."""
    return ray.put(source)


def function_on_all_cores(
    source: Any, plan: Plan, spec: BlockSpec, *, layout: Layout, seconds: float, start: int
) -> float:
    """Return the images per second and core while all cores run the function, without Ray Data.

    Cores share caches, memory and clock frequency, and hyperthreads share a core. So the reference
    for Ray's transport is the speed of all cores at once, not that of a single one.

    Args:
        source: Reference to the source in the object store.
        plan: The order of the images.
        spec: The views to make.
        layout: The data workers, each of which is a process.
        seconds: Duration of the measurement.
        start: First position in the plan.

    Raises:
        RayslError: The error of the function.
        ClusterError: If the CPUs are in use.
    """
    wait_for_cpus(layout)
    actors = [
        _actor(_FunctionTimer, num_cpus=layout.cpus_per_data_worker).remote(source, plan, spec)
        for _ in range(layout.num_data_workers)
    ]
    with own_errors("the stream"):
        ray.get([worker.ready.remote() for worker in actors])  # so that all begin together
        rates = ray.get(
            [worker.time.remote(seconds, start + 10 * n) for n, worker in enumerate(actors)]
        )
    for worker in actors:
        ray.kill(worker)
    return float(sum(rates)) / cores_of(layout)


def _actor(kind: type, **options: Any) -> Any:
    """Return the Ray actor class of a class; as Any, since Ray adds ``remote`` to its methods."""
    return ray.remote(kind).options(**options)


def _pinned_to(node: Any) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


class _FunctionTimer:
    """An actor that times the function of a data worker on its own CPU."""

    def __init__(self, source: Any, plan: Plan, spec: BlockSpec) -> None:
        # Ray has replaced the reference by the source.
        self._make = ItemMaker(source, plan, spec)

    def ready(self) -> None:
        """Return once the process has started."""

    def time(self, seconds: float, start: int) -> float:
        """Return the images per second."""
        return time_whole_items(self._make, seconds=seconds, start=start)


class StreamTask(NamedTuple):
    """The sizes of a measurement of the stream."""

    num_consumers: int
    batch_size: int
    """Images per batch of a consumer."""
    prefetch_batches: int
    round_batches: int
    """Number of batches in which each data worker delivers one block."""
    num_batches: int
    """Number of batches to measure, after the first round."""


def stream_task(
    plan: Plan, spec: BlockSpec, *, layout: Layout, num_consumers: int, prefetch: int, images: float
) -> StreamTask:
    """Return the sizes of a measurement of about ``images`` images, in whole rounds."""
    packing = packing_for(plan, spec, start_step=0, num_workers=num_consumers)
    block_images = packing.steps_per_block * plan.item_size
    round_batches = math.ceil(layout.num_data_workers * block_images / plan.global_batch_size)
    rounds = max(2, math.ceil(images / (plan.global_batch_size * round_batches)))
    return StreamTask(
        num_consumers,
        plan.global_batch_size // num_consumers,
        prefetch,
        round_batches,
        rounds * round_batches,
    )


def steps_needed(task: StreamTask) -> int:
    """Return the number of steps of a plan for the task, with a reserve so that no worker idles."""
    return task.num_batches + 3 * task.round_batches + task.prefetch_batches


def stream(source: Any, plan: Plan, spec: BlockSpec, *, layout: Layout, task: StreamTask) -> Stream:
    """Measure a plan's stream through Ray Data as in training, to consumers that drop the batches.

    Args:
        source: Reference to the source in the object store.
        plan: The order of the images.
        spec: The views to make.
        layout: The data workers.
        task: The sizes of the measurement.

    Raises:
        RayslError: The error of a data worker.
        ClusterError: If the CPUs are in use.
    """
    wait_for_cpus(layout)
    consumers = [_actor(_Consumer, num_cpus=0).remote() for _ in range(task.num_consumers)]
    ray.get([consumer.ready.remote() for consumer in consumers])
    with _MemoryWatch() as watch, own_errors("the stream"):
        began = time.perf_counter()
        dataset = open_dataset(
            source,
            plan,
            spec,
            start_step=0,
            layout=layout._replace(num_train_workers=task.num_consumers),
        )
        dataset.context.execution_options = execution_options()
        shards = dataset.streaming_split(task.num_consumers, equal=True)
        opened_s = time.perf_counter() - began
        measured: list[Throughput] = ray.get(
            [
                consumer.consume.remote(shard, task, task.batch_size // plan.item_size)
                for consumer, shard in zip(consumers, shards, strict=True)
            ]
        )
    for consumer in consumers:
        ray.kill(consumer)
    waits = np.concatenate([each.wait_s for each in measured])
    return Stream(
        images_per_s=sum(each.images_per_s for each in measured),
        first_batch_s=opened_s + max(each.first_batch_s for each in measured),
        wait_s=float(np.median(waits)),
        wait_p99_s=float(np.percentile(waits, 99)),
        wait_share=float(waits.sum() / sum(each.seconds for each in measured)),
        bytes_per_image=statistics.fmean(each.bytes_per_image for each in measured),
        **watch.peaks(),
    )


class _Consumer:
    """An actor that replaces a train worker: it takes batches and drops them."""

    def ready(self) -> None:
        """Return once the process has started."""

    def consume(self, shard: Any, task: StreamTask, blocks_per_batch: int) -> Throughput:
        """Take the batches of a shard, and return the speed."""
        return measure_batches(
            lambda: iterate_shard(
                lambda: shard,
                batch_size=task.batch_size,
                prefetch_batches=task.prefetch_batches,
                blocks_per_batch=blocks_per_batch,
            ),
            batch_size=task.batch_size,
            round_batches=task.round_batches,
            size_of=_bytes_of,
            count=task.num_batches,
        )


def _bytes_of(batch: Block) -> int:
    columns = (c if isinstance(c, tuple) else (c,) for c in batch.values())
    return sum(array.nbytes for column in columns for array in column)


class _MemoryWatch:
    """A context that samples the memory of object store, data workers and this process."""

    def __enter__(self) -> "_MemoryWatch":
        self._total = ray.cluster_resources().get("object_store_memory", 0.0)
        self._store = self._driver = 0
        self._nodes = [
            _actor(_NodeWatch, num_cpus=0, scheduling_strategy=_pinned_to(node)).remote()
            for node in ray.nodes()
            if node["Alive"]
        ]
        ray.get([node.begin.remote() for node in self._nodes])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="raysl-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._workers = ray.get([node.peaks.remote() for node in self._nodes])
        for node in self._nodes:
            ray.kill(node)

    def _sample(self) -> None:
        process = psutil.Process()
        ended = False
        while not ended:  # the last sample is taken at the end
            ended = self._ended.wait(_SAMPLE_STORE_S)
            # Ray counts the memory of objects as a resource in use.
            free = ray.available_resources().get("object_store_memory", self._total)
            self._store = max(self._store, int(self._total - free))
            self._driver = max(self._driver, process.memory_info().rss)

    def peaks(self) -> dict[str, int]:
        """Return the peaks in bytes, under names of :class:`Stream`."""
        return {
            "peak_object_store_bytes": self._store,
            "peak_driver_bytes": self._driver,
            "peak_workers_bytes": sum(resident for resident, _ in self._workers),
            "peak_workers_private_bytes": sum(private for _, private in self._workers),
        }


class _NodeWatch:
    """An actor that sums the memory of its node's data workers: children of the same Ray daemon."""

    def begin(self) -> None:
        """Start to sample."""
        self._peaks = (0, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        daemon = psutil.Process().parent()
        workers: list[psutil.Process] = []
        listed = 0.0
        while daemon is not None and not self._ended.wait(_SAMPLE_PROCESSES_S):
            # Workers are listed until there are some, then at intervals, as more may start.
            if not workers or time.monotonic() - listed > _LIST_PROCESSES_S:
                workers, listed = _data_workers(daemon), time.monotonic()
            resident = private = 0
            for process in workers:
                with suppress(psutil.Error):
                    memory = process.memory_info()
                    resident += memory.rss
                    private += memory.rss - getattr(memory, "shared", 0)
            self._peaks = max(self._peaks[0], resident), max(self._peaks[1], private)

    def peaks(self) -> tuple[int, int]:
        """Stop sampling; return the peaks of resident and of private memory in bytes."""
        self._ended.set()
        self._thread.join()
        return self._peaks


def _data_workers(daemon: psutil.Process) -> list[psutil.Process]:
    workers = []
    for process in daemon.children():
        with suppress(psutil.Error):
            if MakeItems.__name__ in " ".join(process.cmdline()):
                workers.append(process)
    return workers


def wait_for_cpus(layout: Layout) -> None:
    """Wait until the CPUs for the data workers are free; the last measurement may still use them.

    Raises:
        ClusterError: If they stay in use: Ray Data would wait for them without a message.
    """
    needed = layout.num_data_workers * layout.cpus_per_data_worker + READ_CPUS
    deadline = time.monotonic() + _FREE_WITHIN_S
    while (free := ray.available_resources().get("CPU", 0.0)) < needed:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the benchmark needs {needed:g} CPUs; {free:g} of the cluster's "
                f"{ray.cluster_resources().get('CPU', 0):g} are free. Wait for the other work to "
                f"end, or lower cluster.num_data_workers"
            )
        time.sleep(0.2)


def spilled_bytes() -> int | None:
    """Return the bytes that the cluster has spilled from its object store to disk so far.

    Only Ray's command line reports them, in whole MiB. None if the command fails.
    """
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray.scripts.scripts", "memory", "--stats-only"]
    try:
        process = subprocess.run(
            [*command, "--address", address],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"Spilled (\d+) MiB", process.stdout)
    return int(match.group(1)) * _MIB if match else 0
