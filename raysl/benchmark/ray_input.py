"""Measure the input of a run: the data workers' function on all cores, and through Ray Data."""

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

if TYPE_CHECKING:  # the recipe loads torch; the actors below import this file and must not
    from raysl.run.recipe import RunConfig

_MARGIN = 0.02
# Listing a node's processes takes some 20 ms, which the cores that are measured would miss.
_STORE_EVERY_S = 0.5
_PROCESSES_EVERY_S = 0.2
_LIST_EVERY_S = 5.0
_FREE_WITHIN_S = 60.0
_MIB = 1 << 20


class Stream(NamedTuple):
    """What came out of Ray Data, and what it took."""

    images_per_s: float  # of all consumers
    first_batch_s: float
    wait_s: float  # a batch, median
    wait_p99_s: float
    wait_share: float  # of the consumers' time
    bytes_per_image: float
    peak_object_store_bytes: int
    peak_driver_bytes: int
    peak_workers_bytes: int
    """Resident memory of all data workers, with what they share: code and the object store."""
    peak_workers_private_bytes: int


def input_layout(config: "RunConfig[Any]") -> Layout:
    """Lay the data workers out over all CPUs of the connected cluster; nobody trains.

    Raises:
        ClusterError: If there is no CPU for them.
    """
    cpus = float(ray.cluster_resources().get("CPU", 0.0))
    workers = config.cluster.num_data_workers or max(1, math.floor(cpus))
    each = math.floor(100 * min(1.0, (cpus - READ_CPUS - _MARGIN) / workers)) / 100
    if each < _MARGIN:
        raise ClusterError(
            f"{workers} data workers do not fit on the cluster's {cpus:g} CPUs; lower "
            f"cluster.num_data_workers or add nodes"
        )
    nodes = sum(node["Alive"] for node in ray.nodes())
    return Layout(0, 0.0, workers, each, False, 1, nodes)


def cores_of(layout: Layout) -> int:
    """Return the CPUs that make views."""
    return max(1, round(layout.num_data_workers * min(1.0, layout.cpus_per_data_worker + _MARGIN)))


def share_source(source: Any) -> Any:
    """Put a source into the object store, where all workers of a node share it."""
    return ray.put(source)


def function_on_all_cores(
    source: Any, plan: Plan, spec: BlockSpec, *, layout: Layout, seconds: float, start: int
) -> float:
    """Return the images a second a core of the function with every core at work, without Ray Data.

    Cores share caches, memory and clock, and hyperthreads a core: what all of them reach is what
    Ray's transport has to be measured by.

    Args:
        source: Reference of the source.
        plan: The order of the images.
        spec: The views to make.
        layout: One process a data worker.
        seconds: How long to measure.
        start: Position of the plan to begin at.

    Raises:
        RayslError: What the function raised.
        ClusterError: If the CPUs are in use.
    """
    wait_for_cpus(layout)
    many = [
        _actor(_Function, num_cpus=layout.cpus_per_data_worker).remote(source, plan, spec)
        for _ in range(layout.num_data_workers)
    ]
    with own_errors("the stream"):
        ray.get([worker.ready.remote() for worker in many])  # begin together
        rates = ray.get(
            [worker.time.remote(seconds, start + 10 * n) for n, worker in enumerate(many)]
        )
    for worker in many:
        ray.kill(worker)
    return float(sum(rates)) / cores_of(layout)


def _actor(kind: type, **options: Any) -> Any:
    """Return Ray's actor class of a class; its type does not know the class's methods."""
    return ray.remote(kind).options(**options)


def _on(node: Any) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


class _Function:
    """The function of a data worker, on a CPU of its own."""

    def __init__(self, source: Any, plan: Plan, spec: BlockSpec) -> None:
        # Ray has put the source in its reference's place.
        self._make = ItemMaker(source, plan, spec)

    def ready(self) -> None:
        """Return once the process is up."""

    def time(self, seconds: float, start: int) -> float:
        """Return images a second."""
        return time_whole_items(self._make, seconds=seconds, start=start)


class StreamTask(NamedTuple):
    """How to measure a stream."""

    num_consumers: int
    batch_size: int  # of each consumer
    prefetch_batches: int
    round_batches: int  # in which each data worker delivers a block
    num_batches: int  # to measure, after the first round


def stream_task(
    plan: Plan, spec: BlockSpec, *, layout: Layout, num_consumers: int, prefetch: int, images: float
) -> StreamTask:
    """Return how to measure about so many images, in whole rounds; the plan has to hold them."""
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
    """Return the steps of a plan for this measurement: some are left, no worker runs dry."""
    return task.num_batches + 3 * task.round_batches + task.prefetch_batches


def stream(source: Any, plan: Plan, spec: BlockSpec, *, layout: Layout, task: StreamTask) -> Stream:
    """Stream a plan through Ray Data into consumers that do nothing, as training has it.

    Raises:
        RayslError: What a data worker raised.
        ClusterError: If the CPUs are in use.
    """
    wait_for_cpus(layout)
    consumers = [_actor(_Consumer, num_cpus=0).remote() for _ in range(task.num_consumers)]
    ray.get([consumer.ready.remote() for consumer in consumers])
    with _Watch() as watch, own_errors("the stream"):
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
        seen: list[Throughput] = ray.get(
            [
                consumer.consume.remote(shard, task, task.batch_size // plan.item_size)
                for consumer, shard in zip(consumers, shards, strict=True)
            ]
        )
    for consumer in consumers:
        ray.kill(consumer)
    waits = np.concatenate([one.wait_s for one in seen])
    return Stream(
        images_per_s=sum(one.images_per_s for one in seen),
        first_batch_s=opened_s + max(one.first_batch_s for one in seen),
        wait_s=float(np.median(waits)),
        wait_p99_s=float(np.percentile(waits, 99)),
        wait_share=float(waits.sum() / sum(one.seconds for one in seen)),
        bytes_per_image=statistics.fmean(one.bytes_per_image for one in seen),
        **watch.peaks(),
    )


class _Consumer:
    """Stands where a train worker would: takes batches and drops them."""

    def ready(self) -> None:
        """Return once the process is up."""

    def consume(self, shard: Any, task: StreamTask, blocks_per_batch: int) -> Throughput:
        """Take the batches of a shard."""
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


class _Watch:
    """Peaks of memory between entering and leaving: of the cluster's store, nodes, this process."""

    def __enter__(self) -> "_Watch":
        self._total = ray.cluster_resources().get("object_store_memory", 0.0)
        self._store = self._driver = 0
        self._nodes = [
            _actor(_NodeWatch, num_cpus=0, scheduling_strategy=_on(node)).remote()
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
        while not ended:  # once more at the end, and so at least twice
            ended = self._ended.wait(_STORE_EVERY_S)
            # Ray counts what objects occupy as a resource that is taken.
            free = ray.available_resources().get("object_store_memory", self._total)
            self._store = max(self._store, int(self._total - free))
            self._driver = max(self._driver, process.memory_info().rss)

    def peaks(self) -> dict[str, int]:
        """Return the peaks in bytes."""
        return {
            "peak_object_store_bytes": self._store,
            "peak_driver_bytes": self._driver,
            "peak_workers_bytes": sum(resident for resident, _ in self._workers),
            "peak_workers_private_bytes": sum(private for _, private in self._workers),
        }


class _NodeWatch:
    """Adds up the memory of a node's data workers: children of the same Ray daemon as itself."""

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
        while daemon is not None and not self._ended.wait(_PROCESSES_EVERY_S):
            # Until they are there, and at times in case there are more.
            if not workers or time.monotonic() - listed > _LIST_EVERY_S:
                workers, listed = _data_workers(daemon), time.monotonic()
            resident = private = 0
            for process in workers:
                with suppress(psutil.Error):
                    memory = process.memory_info()
                    resident += memory.rss
                    private += memory.rss - getattr(memory, "shared", 0)
            self._peaks = max(self._peaks[0], resident), max(self._peaks[1], private)

    def peaks(self) -> tuple[int, int]:
        """Stop; return the peaks of resident and of private memory in bytes."""
        self._ended.set()
        self._thread.join()
        return self._peaks


def _data_workers(daemon: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in daemon.children():
        with suppress(psutil.Error):
            if MakeItems.__name__ in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_for_cpus(layout: Layout) -> None:
    """Wait until the CPUs that data workers take are free: those of the last measurement end now.

    Raises:
        ClusterError: If they stay in use. Ray Data would wait for them without a word.
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
    """Return the bytes that the cluster has written from its object store to disk so far.

    Ray tells it by its command line only, in MiB; None if that does not answer.
    """
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray.scripts.scripts", "memory", "--stats-only"]
    try:
        done = subprocess.run(
            [*command, "--address", address],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"Spilled (\d+) MiB", done.stdout)
    return int(found.group(1)) * _MIB if found else 0
