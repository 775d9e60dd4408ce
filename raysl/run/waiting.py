"""Say what a run waits for, and end it when it has waited too long. No Ray."""

import time
from collections.abc import Callable
from typing import NamedTuple

_SAY_AFTER_S = 20.0
_SAY_EVERY_S = 300.0

RESIZE = "resize"
"""The phase of a start with another number of workers, which is said at once."""


class Note(NamedTuple):
    """What a part of a run waits for at the moment."""

    phase: str
    """The kind of wait; the text of one phase may change."""
    text: str


class Patience:
    """Measures how long a run has been in one phase.

    Args:
        max_wait_s: Longest wait in seconds; None waits for ever.
        clock: Returns seconds that never decrease.
    """

    def __init__(
        self, max_wait_s: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._phase: str | None = None
        self._since = 0.0

    def waited_s(self, note: Note | None) -> float:
        """Return for how many seconds the phase of a note has lasted, as far as this was asked."""
        phase = None if note is None else note.phase
        if phase != self._phase:
            self._phase, self._since = phase, self._clock()
        return 0.0 if note is None else self._clock() - self._since

    def too_long(self, note: Note | None) -> str | None:
        """Return the message for a wait that has lasted too long, else None."""
        waited = self.waited_s(note)
        if note is None or self._max_wait_s is None or waited <= self._max_wait_s:
            return None
        return (
            f"the run {note.text}. It waited for {waited:.0f} s, longer than "
            f"cluster.max_wait_s={self._max_wait_s:g}. The same command resumes from the last "
            f"checkpoint when there is room; cluster.max_wait_s=null waits for ever"
        )


class WaitMessages:
    """Says what a run waits for: soon after a wait has begun, then rarely.

    Args:
        read: Returns what the run waits for now; None if nothing.
        say: Prints a line.
        clock: Returns seconds that never decrease.
    """

    def __init__(
        self,
        read: Callable[[], Note | None],
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._say = say
        self._patience = Patience(None, clock=clock)
        self._clock = clock
        self._said_at: float | None = None
        self._phase: str | None = None

    def look(self) -> None:
        """Print a line if it is time for one."""
        note = self._read()
        waited = self._patience.waited_s(note)
        phase = None if note is None else note.phase
        if phase != self._phase:
            self._phase, self._said_at = phase, None
        if note is None or waited < (0.0 if phase == RESIZE else _SAY_AFTER_S):
            return
        if self._said_at is None or self._clock() - self._said_at >= _SAY_EVERY_S:
            self._said_at = self._clock()
            so_far = f" (for {waited:.0f} s)" if waited >= 1.0 else ""
            self._say(f"  the run {note.text}{so_far}")
