"""Count, list and limit the bad images of a run."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysl.errors import DataError
from raysl.folder.whole import disk_errors_named, json_object


class BadImages:
    """The bad images of a run, listed in ``bad_images.jsonl``: one line per image.

    All ranks add the same images, so their lists are equal; one rank writes the file. While it
    cannot be written, as on a full disk, its records wait in memory.

    Args:
        path: Path of ``bad_images.jsonl``; images that it already lists are included.
        num_images: Number of images of the source.
        max_share: Largest share of the images that may be bad, in [0, 1].
        name: Returns the path or name of a row, for messages.
        row_id: Returns the id of a row, see ``Source.row_id``.
        reason: Returns why a row is bad, from the row and the number of its flaw.
        writes: Whether this process writes the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_images: int,
        max_share: float,
        name: Callable[[int], str],
        row_id: Callable[[int], str],
        reason: Callable[[int, int], str],
        writes: bool,
    ) -> None:
        self.path = path
        self.num_images = num_images
        self.max_share = max_share
        self._name = name
        self._row_id = row_id
        self._reason = reason
        self._writes = writes
        self._unwritten = b""
        self._rows = {int(record["row"]) for record in _read(path)}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, flaws: Mapping[int, int], *, step: int) -> int:
        """Add bad images and return the number of bad images so far.

        Args:
            flaws: Bad rows, each with the number of its flaw; known rows are skipped.
            step: Optimizer step that read the images.

        Raises:
            DataError: If the share of bad images exceeds ``max_share``.
        """
        new = {row: flaw for row, flaw in sorted(flaws.items()) if row not in self._rows}
        if self._writes:
            for row, flaw in new.items():
                record = {
                    "row": row,
                    "id": self._row_id(row),
                    "name": self._name(row),
                    "reason": self._reason(row, flaw),
                    "step": step,
                }
                self._unwritten += (json.dumps(record) + "\n").encode()
            with suppress(OSError):  # a full disk is reported when a checkpoint fails
                self._write()
        self._rows.update(new)
        if len(self._rows) > self.max_share * self.num_images:
            last = next(reversed(new.items()), None)
            example = f", such as {self._name(last[0])}: {self._reason(*last)}" if last else ""
            raise DataError(
                f"{len(self._rows):,} of {self.num_images:,} images are bad{example}; that is more "
                f"than data.bad_images.max_share={self.max_share:g}. They are listed in "
                f"{self.path}. Repair or remove them, or allow a larger share"
            )
        return len(self._rows)

    def close(self) -> None:
        """Write the records that wait because the disk was full.

        Raises:
            RunFolderError: If they cannot be written.
        """
        with disk_errors_named(self.path):
            self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        with open(self.path, "ab", buffering=0) as file:
            while self._unwritten:
                written = file.write(self._unwritten) or 0
                self._unwritten = self._unwritten[written:]


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the records of the file; other lines are left out. [] if there is no file."""
    if not path.exists():
        return []
    objects = map(json_object, path.read_bytes().splitlines())
    return [each for each in objects if each is not None and type(each.get("row")) is int]
