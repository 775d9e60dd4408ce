"""Follow a run by reading its metrics file in threads while it is written.

Training never waits for these threads. A run that restarts repeats the steps after its last
checkpoint and replaces the file by one without them.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raysl.track.run_folder import follow_metrics

Record = dict[str, Any]

# Speeds differ whenever a step is repeated; they are returned once.
_SPEEDS = ("train/images_per_s", "data/wait_share")


class MetricsReader:
    """Reads new values from a metrics file.

    After a restart, a repeated step's value is returned again only if it differs, as with another
    number of workers or with the settings of another trial; an exact resume repeats equal values.

    Args:
        path: Path of the metrics file; it may not exist yet.
        seen: For each metric, the last step that an earlier reader returned.
        only_new: Return nothing that the file holds now.
    """

    def __init__(
        self, path: Path, seen: dict[str, int] | None = None, *, only_new: bool = False
    ) -> None:
        self.path = path
        self.seen = dict(seen or {})
        # Kept open: after a restart has replaced the file, it still holds the dropped records.
        self._file: int | None = None
        self._begin = 0  # offset of the first record that counts as returned
        self._offset = 0
        self._dropped: dict[tuple[int, str], float] = {}  # returned values of repeated steps
        self._unread: list[Record] = []
        if path.exists():
            self._unread = self._read_first()
            if only_new:
                self._unread, self._begin = [], self._offset

    def read(self) -> list[Record]:
        """Return the new records; each has ``step``, ``time`` and the metrics not yet returned."""
        records, self._unread = self._unread, []
        if not self.path.exists():
            return records
        if self._file is None:
            return records + self._read_first()
        opened, status = os.fstat(self._file), self.path.stat()
        if status.st_ino != opened.st_ino:
            self._switch()
        elif status.st_size < self._offset:  # cut in place, so what was dropped is not known
            self._begin = self._offset = 0
        return records + [new for record in self._records() if len(new := self._new(record)) > 2]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read_first(self) -> list[Record]:
        """Open the file and return its records, without what an earlier reader returned."""
        self._file = os.open(self.path, os.O_RDONLY)
        earlier = dict(self.seen)
        records = []
        for record in self._records():
            step = int(record["step"])
            values = {k: v for k, v in _values(record) if step > earlier.get(k, -1)}
            if values:
                self.seen.update(dict.fromkeys(values, step))
                records.append({"step": step, "time": record.get("time", 0.0), **values})
        return records

    def _records(self) -> Iterator[Record]:
        assert self._file is not None
        for record, offset in follow_metrics(self._file, self._offset):
            self._offset = offset
            yield record

    def _new(self, record: Record) -> Record:
        """Return a record of the open file without the values that are repeated."""
        step = int(record["step"])
        new = {"step": step, "time": record.get("time", 0.0)}
        for name, value in _values(record):
            before = self._dropped.pop((step, name), None)
            if before is None or not (_is_same(before, value) or _is_speed(name)):
                new[name] = value
                self.seen[name] = step
        return new

    def _switch(self) -> None:
        """Open the file that replaced this one, and go on after the records that both contain."""
        assert self._file is not None
        old, end, begin = self._file, self._offset, self._begin
        self._file = os.open(self.path, os.O_RDONLY)
        self._begin = self._offset = start = 0
        kept = follow_metrics(self._file, 0)
        newest = next(kept, None)
        for record, offset in follow_metrics(old, 0):
            if offset > end:
                break
            if newest is not None and record == newest[0]:
                self._offset = newest[1]
                if start < begin:
                    self._begin = self._offset
                newest = next(kept, None)
            elif start >= begin:
                step = int(record["step"])
                self._dropped.update({(step, name): value for name, value in _values(record)})
            start = offset
        os.close(old)


def _values(record: Record) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name not in ("step", "time") and isinstance(value, (int, float)):
            yield name, value


def _is_same(before: float, value: float) -> bool:
    return before == value or (math.isnan(before) and math.isnan(value))


def _is_speed(name: str) -> bool:
    return name in _SPEEDS or name.startswith("time/")


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
        self.reader.close()

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self.consume(self.reader.read())
        self.consume(self.reader.read())
