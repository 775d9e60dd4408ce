"""Follow a run by reading its metrics file in threads while it is written.

Training never waits for these threads. A run that restarts repeats the steps after its last
checkpoint and rewrites the file; the reader then reads it from the start, but returns no value
twice.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysl.track.run_folder import follow_metrics

Record = dict[str, Any]


class MetricsReader:
    """Reads new values from a metrics file.

    Args:
        path: Path of the metrics file; it may not exist yet.
        seen: For each metric, the last step that an earlier reader returned.
    """

    def __init__(self, path: Path, seen: dict[str, int] | None = None) -> None:
        self.path = path
        self.seen = dict(seen or {})
        self._offset = 0
        self._inode = 0

    def read(self) -> list[Record]:
        """Return the new records; each has ``step``, ``time`` and the metrics not yet returned."""
        if not self.path.exists():
            return []
        status = self.path.stat()
        # A restart replaces the file; the new file may already be longer than the old one.
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._inode, self._offset = status.st_ino, 0
        new_records = []
        for record, offset in follow_metrics(self.path, self._offset):
            self._offset = offset
            step = int(record["step"])
            values = {
                name: value
                for name, value in record.items()
                if name not in ("step", "time") and step > self.seen.get(name, -1)
            }
            if values:
                self.seen.update(dict.fromkeys(values, step))
                new_records.append({"step": step, "time": record["time"], **values})
        return new_records


class Follower:
    """Calls a function with new records at regular intervals, in its own thread.

    Args:
        reader: Reads the records.
        consume: Called with the list of new records, which may be empty.
        every_s: Seconds between two calls.
    """

    def __init__(
        self, reader: MetricsReader, consume: Callable[[list[Record]], None], *, every_s: float
    ) -> None:
        self.reader = reader
        self.consume = consume
        self.every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raysl-follow", daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self.consume(self.reader.read())
        self.consume(self.reader.read())
