"""The last step of a run, noted as it goes, so that a resume can tell what is done again."""

import io
import os
import time
from contextlib import suppress
from pathlib import Path

_NOTED_EVERY_S = 0.1  # a slower step is always noted, a faster run may be noted this much behind


class StepNote:
    """Writes the number of steps done into a small file, in place.

    A write takes microseconds, as it reaches the memory of the system and not the disk: the note
    outlives the process, not the machine. Errors are ignored.

    Args:
        path: The file.
        start_step: Number of steps done at the start, which is noted at once.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        self._file: io.FileIO | None = None
        self._noted_at = -_NOTED_EVERY_S
        with suppress(OSError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            self._file = io.FileIO(descriptor, "w")
        self(start_step)

    def __call__(self, steps_done: int) -> None:
        """Note that so many steps are done."""
        now = time.monotonic()
        if self._file is None or now - self._noted_at < _NOTED_EVERY_S:
            return
        self._noted_at = now
        with suppress(OSError):
            os.pwrite(self._file.fileno(), b"%020d\n" % steps_done, 0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_step_note(path: Path) -> int:
    """Return the number of steps in a note; 0 if there is none, or it is damaged."""
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):
        return 0
