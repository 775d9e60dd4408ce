"""A folder that all processes of a command see: on a shared disk, or as local copies of a store."""

from pathlib import Path
from typing import Any, Protocol


class Copied(Protocol):
    """The copy in a store of a folder that is a local copy itself; see ``raysl.store``."""

    address: str
    """Address of the folder in the store."""

    def publish(self, *, waits: bool) -> None:
        """Copy the folder's changes to the store."""
        ...

    def fetch(self, below: str = "") -> None:
        """Copy what other processes have written from the store, to one folder if it is named."""
        ...

    def for_workers(self) -> Any:
        """Return what other processes need to open the folder; it can be pickled."""
        ...


class SharedFolder:
    """A folder on a disk that all nodes share, or a local copy of one in a store.

    Args:
        path: Path of the folder; stored as absolute, since other processes have other working
            directories.
        stored: The folder's copy in a store; None if the folder is on a disk that all nodes share.
    """

    def __init__(self, path: Path, *, stored: Copied | None = None) -> None:
        self.path = path.absolute()
        self.stored = stored

    def publish(self, *, waits: bool = False) -> None:
        """Let other nodes see what is in the folder; on a disk, they do already.

        Without ``waits`` this copies in the background, and only waits for the copy before.

        Raises:
            RunFolderError: If the store fails for longer than a minute.
        """
        if self.stored is not None:
            self.stored.publish(waits=waits)

    def fetch(self, below: str = "") -> None:
        """Get what other nodes have written; on a disk, it is there already.

        Args:
            below: A folder in this one to get; empty for the whole folder.

        Raises:
            RunFolderError: If the store fails for longer than a minute.
        """
        if self.stored is not None:
            self.stored.fetch(below)

    def shown(self, path: Path | None = None) -> str:
        """Return the path or address of the folder, or of a file in it, as other nodes know it."""
        path = path or self.path
        if self.stored is None:
            return str(path)
        name = path.relative_to(self.path).as_posix()
        return self.stored.address if name == "." else f"{self.stored.address}/{name}"
