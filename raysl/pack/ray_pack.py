"""Run the work units of a pack as Ray tasks on all nodes.

Plain tasks, not Ray Data: a unit reads, decodes and writes by itself, so there is nothing to stream
between workers, and Ray repeats a task that is lost with its node: it writes the same file.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import cv2
import ray
from ray.exceptions import RayActorError

from raysl.errors import ClusterError
from raysl.pack.folder import CLAIM, PackFolder
from raysl.pack.run import Calls, Facts, Runner, Unit
from raysl.pack.shards import Job, Report
from raysl.run.ray_errors import result_of
from raysl.sources.source import Source

_MAX_RETRIES = 3
_LOST = (
    f"a task of the pack was lost {_MAX_RETRIES + 1} times, as when memory runs out; "
    "the same command goes on, and a lower num_workers or shard_mib takes less memory"
)
_LOOK_EVERY_S = 0.5


def on_ray(num_workers: int | None) -> Runner:
    """Return a function that runs units on the connected cluster.

    Args:
        num_workers: Concurrent tasks, each on one CPU; None takes one for each CPU of the cluster.
    """

    def run(
        function: Unit,
        source: Source,
        job: Job,
        calls: Calls,
        *,
        report: Report,
    ) -> Iterator[Facts]:
        most = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # One object in the store of each node; the labels must be read before it is sent.
        source.labels()
        shared = ray.put(source)
        counter = _Counter.remote()  # type: ignore[attr-defined] # Ray's decorator adds it
        waiting = deque(calls)
        running: list[ray.ObjectRef[Facts]] = []
        counted = 0
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    call = waiting.popleft()
                    running.append(_work.remote(function, shared, job, call, counter))
                ended, running = ray.wait(running, num_returns=1, timeout=_LOOK_EVERY_S)
                total = _count(counter, counted)
                report(total - counted)
                counted = total
                for reference in ended:
                    yield result_of(reference, lost=_LOST)
        finally:  # after an error, or Ctrl-C
            for reference in running:
                ray.cancel(reference)

    return run


@ray.remote(num_cpus=0, max_restarts=-1)
class _Counter:
    """Counts the images that the tasks have finished."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, count: int) -> None:
        self._total += count

    def total(self) -> int:
        return self._total


@ray.remote(num_cpus=1, max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")
def _work(function: Unit, source: Source, job: Job, call: tuple[Any, ...], counter: Any) -> Facts:
    cv2.setNumThreads(1)  # a task has one CPU
    if PackFolder(job.output).read(CLAIM) is None:
        raise ClusterError(
            f"node {ray.util.get_node_ip_address()} does not see {job.output}: on several nodes "
            f"the shards must go to a disk that all share or to an object store"
        )
    return function(source, job, *call, num_threads=1, report=counter.add.remote)


def _count(counter: Any, before: int) -> int:
    """Return the finished images; a restarted counter begins at 0, so the larger number counts."""
    with suppress(RayActorError):
        return max(before, int(ray.get(counter.total.remote())))
    return before
