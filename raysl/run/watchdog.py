"""Notice a training step that does not end, and say which worker hangs, where and since when.

Each rank watches itself in a thread: a worker that waits for another one waits as long as that one
hangs. So every rank writes its stacks into the run folder and leaves a note of what it is doing,
and the one that is not waiting for the others is named. A process that does not run at all writes
nothing, which names it too.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from raysl.nn.collectives import rank_and_size
from raysl.run.notes import FolderNotes, Notes
from raysl.track.events import note_hang
from raysl.track.run_folder import RunFolder
from raysl.track.step_note import StepNote
from raysl.train.loop import FIRST_BATCH, Doing

_TIMES_LONGEST = 10  # a step may take this often as long as the longest one so far
_POLLS = 20  # looks per limit
_LONGEST_POLL_S = 5.0
_FOR_OTHERS_S = 10.0  # how long the other ranks have for writing what they are doing
_FOR_TELLING_S = 1.0
_PACKAGE = str(Path(__file__).parent.parent)
_STALE_TIMES = 3

End = Callable[[str], None]
"""Ends the training, whose thread does not answer; the argument says why."""
Tell = Callable[[int, str], None]
"""Receives the step and a line about the workers that hang, on one of the ranks."""


class OnHang(NamedTuple):
    """What to do when a training hangs."""

    end: End
    notes: Notes | None = None
    """Where the ranks tell each other what they are doing; None is the run folder."""


class Stuck(NamedTuple):
    """What a rank was doing when it made no progress."""

    rank: int
    step: int
    doing: str
    where: str
    """File, line and function of raysl's innermost frame."""
    waits: bool
    """Whether it is in an operation that waits for the other ranks."""


@contextmanager
def watch(
    folder: RunFolder, *, start_step: int, limit_s: float | None, on_hang: OnHang | None
) -> Iterator[Doing]:
    """Provide what the loop of this rank tells of each step within a block.

    Rank 0 notes the step, for the next start, and a :class:`Watchdog` watches for steps that hang.

    Args:
        folder: The run folder.
        start_step: Number of steps already done.
        limit_s: Seconds without progress; None never ends a training.
        on_hang: What to do then; None lets a training hang.
    """
    rank, size = rank_and_size()
    end, notes = on_hang or OnHang(end=lambda text: None)
    watchdog = Watchdog(
        folder.stacks,
        shown=folder.shown(folder.stacks),
        notes=FolderNotes(folder.stacks) if notes is None else notes,
        rank=rank,
        size=size,
        limit_s=None if on_hang is None else limit_s,
        end=end,
        tell=lambda step, text: note_hang(folder, text, step=step),
    )
    if rank != 0:
        with watchdog:
            yield watchdog
        return
    with closing(StepNote(folder.last_step, start_step=start_step)) as note, watchdog:

        def doing(step: int, what: str) -> None:
            note(step - 1)
            watchdog(step, what)

        yield doing


class Watchdog:
    """Watches the loop of one rank within a ``with`` block; the loop calls it at each phase.

    Time in which the process was stopped as a whole does not count.

    Args:
        folder: Where this rank writes its stacks; its parent must exist.
        shown: The folder's name in messages.
        notes: Where the ranks tell each other what they are doing.
        rank: This rank.
        size: Number of ranks.
        limit_s: Seconds without progress; None never ends a training. Ten times the longest phase
            so far is allowed in any case, and waiting for the first batch has no limit.
        end: Called in the watching thread when the training hangs.
        tell: Called before it, on the lowest rank that can say so.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shown: str,
        notes: Notes,
        rank: int,
        size: int,
        limit_s: float | None,
        end: End,
        tell: Tell,
    ) -> None:
        self._folder = folder
        self._shown = shown
        self._notes = notes
        self._rank = rank
        self._size = size
        self._limit_s = limit_s
        self._end = end
        self._tell = tell
        self._phase: tuple[int, str] = (0, FIRST_BATCH)
        self._began = time.monotonic()
        self._longest_s = 0.0
        self._watched = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="raysl-watchdog", daemon=True)

    def __call__(self, step: int, doing: str) -> None:
        """Note what begins: the work on a step, counted from 1."""
        now = time.monotonic()
        if self._phase[1] != FIRST_BATCH:
            self._longest_s = max(self._longest_s, now - self._began)
        self._phase, self._began = (step, doing), now

    def __enter__(self) -> "Watchdog":
        self._notes.remove(_name(self._rank))
        with suppress(OSError):
            self._stacks(self._rank).unlink(missing_ok=True)
        self._watched = threading.get_ident()
        if self._limit_s is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        assert self._limit_s is not None
        poll_s = min(_LONGEST_POLL_S, self._limit_s / _POLLS)
        seen, idle_s, looked = self._phase, 0.0, time.monotonic()
        while not self._over.wait(poll_s):
            now = time.monotonic()
            # A longer pause means that this thread did not run either.
            idle_s += min(now - looked, _STALE_TIMES * poll_s)
            looked = now
            if self._phase != seen or seen[1] == FIRST_BATCH:
                seen, idle_s = self._phase, 0.0
            elif idle_s > max(self._limit_s, _TIMES_LONGEST * self._longest_s):
                if self._is_stuck(seen):
                    self._tell_and_end(seen[0], idle_s)
                    return
                idle_s = 0.0

    def _is_stuck(self, seen: tuple[int, str]) -> bool:
        """Write what this rank is doing, wait for what the others write, and look once more."""
        stuck = self._stuck(*seen)
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            with open(self._stacks(self._rank), "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        self._notes.write(_name(self._rank), stuck._asdict())
        deadline = time.monotonic() + min(_FOR_OTHERS_S, max(1.0, self._limit_s or 0.0))
        while time.monotonic() < deadline and not self._over.is_set():
            if all(self._notes.read(_name(rank)) is not None for rank in range(self._size)):
                break
            time.sleep(0.05)
        if self._over.is_set() or self._phase != seen:
            self._notes.remove(_name(self._rank))
            return False
        return True

    def _tell_and_end(self, step: int, idle_s: float) -> None:
        notes = [(rank, self._notes.read(_name(rank))) for rank in range(self._size)]
        stuck = [Stuck(**note) for _, note in notes if note is not None]
        silent = [rank for rank, note in notes if note is None]
        text = (
            f"{_who_hangs(stuck, silent)}: no progress for {idle_s:.0f} s "
            f"(health.max_step_s={self._limit_s:g}). "
            f"{'; '.join([*map(_told, stuck), *map(_told_of_silent, silent)])}. The stacks of all "
            f"threads are in {self._shown}"
        )
        if self._rank == min(each.rank for each in stuck):
            self._tell(step, text)
        else:
            time.sleep(_FOR_TELLING_S)  # the end of this process may end that of the other rank
        self._end(text)

    def _stuck(self, step: int, doing: str) -> Stuck:
        frame = sys._current_frames().get(self._watched)
        waits = self._size > 1 and _waits_for_ranks(frame)
        return Stuck(self._rank, step, doing, _innermost(frame), waits)

    def _stacks(self, rank: int) -> Path:
        return self._folder / f"{_name(rank)}.txt"


def _name(rank: int) -> str:
    return f"rank{rank}"


def _who_hangs(stuck: list[Stuck], silent: list[int]) -> str:
    """Name the ranks that do not wait for others; all, if there are none."""
    ranks = silent or [each.rank for each in stuck if not each.waits]
    ranks = ranks or [each.rank for each in stuck]
    if len(stuck) + len(silent) == 1:
        return "the train worker hangs"
    names = ", ".join(map(str, ranks))
    return f"train worker {names} hangs" if len(ranks) == 1 else f"train workers {names} hang"


def _told(stuck: Stuck) -> str:
    waits = ", where it waits for the other workers" if stuck.waits else ""
    return f"worker {stuck.rank}: step {stuck.step}, {stuck.doing}, at {stuck.where}{waits}"


def _told_of_silent(rank: int) -> str:
    return f"worker {rank}: its process does not run"


def _innermost(frame: FrameType | None) -> str:
    """Return the place in raysl, or the innermost place at all."""
    first = frame
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    frame = frame or first
    if frame is None:
        return "an unknown place"
    file = Path(frame.f_code.co_filename)
    if file.is_relative_to(_PACKAGE):
        file = file.relative_to(Path(_PACKAGE).parent)
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"


def _waits_for_ranks(frame: FrameType | None) -> bool:
    """Return whether a thread is in a collective operation, or in a backward pass, which has them.

    Gradients are averaged in the backward pass, by threads that have no frames.
    """
    while frame is not None:
        name = frame.f_code.co_filename.replace(os.sep, "/")
        if "/torch/distributed/" in name or name.endswith("/torch/autograd/graph.py"):
            return True
        frame = frame.f_back
    return False
