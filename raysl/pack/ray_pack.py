"""Run the work units of a pack as Ray tasks on all nodes.

These are plain tasks, not Ray Data: a unit reads, decodes and writes by itself, so nothing is
streamed between workers. Ray repeats a task that is lost with its node; it writes the same file.
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
    f"a task of the pack was lost {_MAX_RETRIES + 1} times, possibly because memory ran out; "
    "the same command resumes, and a lower num_workers or shard_mib takes less memory"
)
_POLL_S = 0.5


def ray_runner(num_workers: int | None) -> Runner:
    """Return a function that runs units on the connected cluster.

    Args:
        num_workers: Number of concurrent tasks, each on one CPU; None runs one per CPU of the
            cluster.
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
        # The source is one object in the store of each node; its labels are read before it is sent.
        source.labels()
        shared = ray.put(source)
        counter = _Counter.remote()  # type: ignore[attr-defined] # Ray's decorator adds it
        waiting = deque(calls)
        running: list[ray.ObjectRef[Facts]] = []
        reported = 0
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    call = waiting.popleft()
                    running.append(_work.remote(function, shared, job, call, counter))
                ended, running = ray.wait(running, num_returns=1, timeout=_POLL_S)
                total = _count(counter, reported)
                report(total - reported)
                reported = total
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
            f"node {ray.util.get_node_ip_address()} does not see {job.output}: on several nodes, "
            f"the shards must be on a disk that all nodes share or in an object store"
        )
    return function(source, job, *call, num_threads=1, report=counter.add.remote)


def _count(counter: Any, previous: int) -> int:
    """Return the number of finished images; a restarted counter must not lower it."""
    with suppress(RayActorError):
        return max(previous, int(ray.get(counter.total.remote())))
    return previous
