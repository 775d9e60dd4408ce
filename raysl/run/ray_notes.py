"""Pass on what a run waits for between its processes, through Ray's key-value store."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.experimental import internal_kv

from raysl.errors import counted
from raysl.run.nodes import ANYWHERE, Roles, describe_nodes
from raysl.run.ray_cluster import nodes_now
from raysl.run.ray_data import MakeItems
from raysl.run.waiting import Note

T = TypeVar("T")

_NAMESPACE = b"raysl"
_NOTE, _STOP = "note", "stop"
_FIRST_BATCH = "first batch"
_TELL_EVERY_S = 5.0


class Board:
    """Small values that the processes of one run tell each other.

    Ray's key-value store needs no process of its own and no common disk, and is there in every
    process.

    Args:
        kind: What the values are about.
        run: A text that names the run in the cluster.
    """

    def __init__(self, kind: str, run: str) -> None:
        self._prefix = f"{kind}/{run}/".encode()

    def write(self, name: str, value: Any) -> None:
        """Write a value that JSON can hold, instead of an earlier one."""
        key, text = self._prefix + name.encode(), json.dumps(value).encode()
        internal_kv._internal_kv_put(key, text, overwrite=True, namespace=_NAMESPACE)

    def read(self, name: str) -> Any:
        """Return a value; None if there is none."""
        key = self._prefix + name.encode()
        text = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        return None if text is None else json.loads(text)

    def names(self) -> list[str]:
        """Return the names of all values."""
        keys: list[bytes] = internal_kv._internal_kv_list(self._prefix, namespace=_NAMESPACE)
        return [key.removeprefix(self._prefix).decode() for key in keys]

    def remove(self, name: str) -> None:
        """Remove a value, if it is there."""
        internal_kv._internal_kv_del(self._prefix + name.encode(), namespace=_NAMESPACE)


class Notes:
    """What one run waits for: its controller and its rank 0 write it, its driver reads it.

    The driver also asks the controller to stop by it.

    Args:
        run: A text that names the run in the cluster.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._board = Board("waits", run)

    def write(self, phase: str, text: str) -> None:
        """Write what the run waits for, instead of what it waited for before."""
        self._board.write(_NOTE, Note(phase, text))

    def read(self) -> Note | None:
        """Return what the run waits for; None if nothing."""
        value = self._board.read(_NOTE)
        return None if value is None else Note(*value)

    def clear(self) -> None:
        """Write that the run waits for nothing."""
        self._board.remove(_NOTE)

    def ask_to_stop(self) -> None:
        """Ask the controller, which sees no folder of the driver, to end a run that waits."""
        self._board.write(_STOP, True)

    def is_to_stop(self) -> bool:
        """Return whether the run is to end."""
        return bool(self._board.read(_STOP))

    def forget(self) -> None:
        """Remove everything, at the start and the end of a command."""
        self.clear()
        self._board.remove(_STOP)


def first_batch_with_notes(notes: Notes, roles: Roles = ANYWHERE) -> Callable[["Future[T]"], T]:
    """Return a function that waits for the first batch, and writes meanwhile what it waits for."""

    def wait(first_batch: "Future[T]") -> T:
        while True:
            try:
                first = first_batch.result(timeout=_TELL_EVERY_S)
            except TimeoutError:
                if first_batch.done():  # the error is the stream's own
                    raise
                notes.write(_FIRST_BATCH, _missing_batch(roles))
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


def _missing_batch(roles: Roles) -> str:
    """Return what the first batch of this run waits for."""
    states = [actor["State"] for actor in data_worker_actors()]
    started = states.count("ALIVE")
    nodes = nodes_now()
    if (node := roles.missing(nodes.all)) is not None:
        return f"waits for {node}"
    cluster = describe_nodes(*nodes.only(roles.makes_views))
    if not states:
        return f"waits for Ray Data to start its data workers: {cluster}"
    if started < len(states):
        missing = len(states) - started
        return f"waits for {missing} of {counted(len(states), 'data worker')} to start: {cluster}"
    return f"waits for the first batch of {counted(started, 'data worker')}: {cluster}"
