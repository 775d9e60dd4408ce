"""Small values that the processes of a run leave for each other."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from raysl.folder.whole import read_json, write_json


class Notes(Protocol):
    """Values that JSON can hold, by name; on Ray they need no common disk."""

    def write(self, name: str, value: Any) -> None:
        """Write a value, instead of an earlier one."""
        ...

    def read(self, name: str) -> Any:
        """Return a value; None if there is none."""
        ...

    def names(self) -> list[str]:
        """Return the names of all values."""
        ...

    def remove(self, name: str) -> None:
        """Remove a value, if it is there."""
        ...


class FolderNotes:
    """Notes in a folder that all processes see. Errors of the disk are ignored.

    Args:
        folder: The folder; its parent must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, value: Any) -> None:
        """Write a value, a dictionary, instead of an earlier one."""
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)  # not its parent: a deleted run stays deleted
            write_json(self._path(name), value)

    def read(self, name: str) -> Any:
        """Return a value; None if there is none."""
        return read_json(self._path(name))

    def names(self) -> list[str]:
        """Return the names of all values."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def remove(self, name: str) -> None:
        """Remove a value, if it is there."""
        with suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
