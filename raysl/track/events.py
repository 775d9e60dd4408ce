"""What happened to a run besides training: ``events.jsonl``, which the driver prints.

The workers append to it: resumes, checkpoints that had to be tried again, workers that hung.
"""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysl.track.run_folder import RunFolder, follow_metrics, read_metrics

_HUNG = "hung"


def note_event(path: Path, text: str, *, step: int, **facts: float | str) -> None:
    """Append an event; if the file cannot be written, print it to standard error.

    Args:
        path: ``events.jsonl`` of a run folder that exists.
        text: A line for the user.
        step: Optimizer steps done.
        facts: Further values of the record.
    """
    record = {"step": step, "time": time.time(), "text": text, **facts}
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError:  # such as the full disk that the event is about
        with suppress(OSError):
            sys.stderr.write(f"{text}\n")


class EventsReader:
    """Reads new events.

    Args:
        path: ``events.jsonl``; it may not exist yet. Events that it holds now are not returned.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """Return the events since the last call, each with ``step``, ``time`` and ``text``."""
        if not self._path.exists():
            return []
        events = []
        for record, offset in follow_metrics(self._path, self._offset):
            self._offset = offset
            if isinstance(record.get("text"), str):
                events.append(record)
        return events


def note_hang(folder: RunFolder, text: str, *, step: int) -> None:
    """Append that workers hang."""
    note_event(folder.events, text, step=step, **{_HUNG: 1.0})


def last_hang(folder: RunFolder, *, since: float) -> str | None:
    """Return the text about the last hang since a time in seconds since 1970, or None."""
    events = [e for e in read_metrics(folder.events) if e.get(_HUNG) and e["time"] >= since]
    return str(events[-1]["text"]) if events else None
