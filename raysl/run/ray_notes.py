"""Pass on what a run waits for between its processes, through Ray's key-value store."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.experimental import internal_kv

from raysl.errors import counted
from raysl.run.ray_cluster import describe_nodes, nodes_now
from raysl.run.ray_data import MakeItems
from raysl.run.waiting import Note

T = TypeVar("T")

_NAMESPACE = b"raysl"
_FIRST_BATCH = "first batch"
_TELL_EVERY_S = 5.0


class Notes:
    """What one run waits for: its controller and its rank 0 write it, its driver reads it.

    Ray's store needs no process of its own and no common disk, and is there in every process.

    Args:
        run: A text that names the run in the cluster.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def write(self, phase: str, text: str) -> None:
        """Write what the run waits for, instead of what it waited for before."""
        value = json.dumps(Note(phase, text)).encode()
        internal_kv._internal_kv_put(self._key, value, overwrite=True, namespace=_NAMESPACE)

    def read(self) -> Note | None:
        """Return what the run waits for; None if nothing."""
        value = internal_kv._internal_kv_get(self._key, namespace=_NAMESPACE)
        return None if value is None else Note(*json.loads(value))

    def clear(self) -> None:
        """Write that the run waits for nothing."""
        internal_kv._internal_kv_del(self._key, namespace=_NAMESPACE)

    @property
    def _key(self) -> bytes:
        return f"waits/{self.run}".encode()


def first_batch_with_notes(notes: Notes) -> Callable[["Future[T]"], T]:
    """Return a function that waits for the first batch, and writes meanwhile what it waits for."""

    def wait(first_batch: "Future[T]") -> T:
        while True:
            try:
                first = first_batch.result(timeout=_TELL_EVERY_S)
            except TimeoutError:
                if first_batch.done():  # the error is the stream's own
                    raise
                notes.write(_FIRST_BATCH, _missing_batch())
            else:
                notes.clear()
                return first

    return wait


def data_worker_actors() -> list[dict[str, Any]]:
    """Return what Ray knows of this job's data workers, without those that are dead."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return [
        actor
        for actor in ray._private.state.actors(job_id=job).values()
        if MakeItems.__name__ in actor["ActorClassName"] and actor["State"] != "DEAD"
    ]


def _missing_batch() -> str:
    """Return what the first batch of this run waits for."""
    states = [actor["State"] for actor in data_worker_actors()]
    started = states.count("ALIVE")
    nodes = nodes_now()
    cluster = describe_nodes(nodes.all, nodes.free)
    if not states:
        return f"waits for Ray Data to start its data workers: {cluster}"
    if started < len(states):
        missing = len(states) - started
        return f"waits for {missing} of {counted(len(states), 'data worker')} to start: {cluster}"
    return f"waits for the first batch of {counted(started, 'data worker')}: {cluster}"
