"""Notice a train worker whose process does not run at all, and end it, so that Ray replaces it.

A worker notices by itself that a step hangs (:mod:`raysl.run.watchdog`), but not that its process
is stopped, or that a thread keeps Python's lock. Ray takes ten minutes to notice it. So each worker
writes a small note from a thread, and the driver ends a worker whose note does not change for long.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysl.errors import ClusterError
from raysl.run.notes import Notes
from raysl.track.events import note_hang
from raysl.track.run_folder import RunFolder
from raysl.track.step_note import read_step_note

_BEATS = 10  # per limit
_SHORTEST_BEAT_S = 0.5
_PATIENCE = 1.5  # limits without a beat
_KILL_TIMEOUT_S = 60.0
_TITLE = "RayTrainWorker"  # in the command line of such a process

Kill = Callable[[dict[str, Any]], bool]
"""Ends the process of a note, and returns whether it was there."""


@contextmanager
def beats(notes: Notes, *, rank: int, limit_s: float | None) -> Iterator[None]:
    """Show within the block that the process of a train worker runs."""
    if limit_s is None:
        yield
        return
    node = ray.get_runtime_context().get_node_id()
    facts = {"rank": rank, "pid": os.getpid(), "node": node}

    def beat() -> None:
        with suppress(ray.exceptions.RayError):
            notes.write(str(rank), {**facts, "time": time.time()})

    try:
        with _repeated(beat, limit_s=limit_s, name="raysl-beats"):
            yield
    finally:
        with suppress(ray.exceptions.RayError):
            notes.remove(str(rank))


@contextmanager
def ends_stopped_workers(
    folder: RunFolder,
    notes: Notes,
    *,
    limit_s: float | None,
    head_answers: Callable[[], bool] = lambda: True,
    kill: Kill | None = None,
) -> Iterator[None]:
    """End within the block, in the driver, each train worker whose process does not run.

    Args:
        folder: The run folder, where it is told.
        notes: The notes of the run's workers; those of an earlier start are removed.
        limit_s: ``health.max_step_s``; None ends none.
        head_answers: Whether the control store answers; see :mod:`raysl.run.ray_head`.
        kill: Replaces the end of a process, in tests.
    """
    for rank in notes.names():
        notes.remove(rank)
    if limit_s is None:
        yield
        return
    last: dict[str, tuple[Any, float]] = {}  # each note, and when it changed

    def look(rank: str) -> None:
        note, now = notes.read(rank), time.monotonic()
        if note is None or rank not in last or last[rank][0] != note:
            last[rank] = note, now
        elif now - last[rank][1] > _PATIENCE * limit_s:
            last[rank] = note, float("inf")  # once
            if (kill or _kill_on_node)(note):
                note_hang(
                    folder,
                    f"train worker {note['rank']} hangs: its process {note['pid']} has not run for "
                    f"{_PATIENCE * limit_s:.0f} s (health.max_step_s={limit_s:g}), and was ended",
                    step=read_step_note(folder.last_step),
                )

    def look_at_all() -> None:
        with suppress(OSError, ray.exceptions.RayError, ClusterError):
            for rank in notes.names() if head_answers() else ():
                look(rank)

    with _repeated(look_at_all, limit_s=limit_s, name="raysl-stopped"):
        yield


@contextmanager
def _repeated(work: Callable[[], None], *, limit_s: float, name: str) -> Iterator[None]:
    """Call a function within the block from a thread, at once and several times per limit."""
    is_over = threading.Event()

    def repeat() -> None:
        work()
        while not is_over.wait(max(_SHORTEST_BEAT_S, limit_s / _BEATS)):
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _kill_on_node(note: dict[str, Any]) -> bool:
    place = NodeAffinitySchedulingStrategy(note["node"], soft=False)
    task = ray.remote(kill_worker).options(num_cpus=0, scheduling_strategy=place)
    return bool(ray.get(task.remote(note["pid"]), timeout=_KILL_TIMEOUT_S))


def kill_worker(pid: int) -> bool:
    """End a train worker on this node; return whether the process was there."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if _TITLE.encode() not in command:  # another process got the number
            return False
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True
