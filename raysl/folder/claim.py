"""Compare the settings of a folder with those of a command, refuse the folder, or rename it.

Each kind of folder stores its settings in a file of its own and defines which of them may change.
This module has the code that all kinds share.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

ANOTHER_NAME = "Give this one another name=..."
_LINE_START = "\n  "
OR_FRESH = f"{ANOTHER_NAME}, or --fresh to set the old one aside"


def _unchanged(_: str, value: Any) -> Any:
    return value


def changes(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    keys: Iterable[str] | None = None,
    compared: Callable[[str, Any], Any] = _unchanged,
    named: Mapping[str, str] | None = None,
    line: str = "{key}: {old} -> {new}",
) -> list[str]:
    """List the settings that differ between a folder and a command, one line each.

    Args:
        old: Settings of the folder.
        new: Settings of the command.
        keys: Keys to compare, in this order; None compares all keys. A missing value is None.
        compared: Converts a key's value before the comparison, for example to an absolute path.
        named: Other names of keys for the lines; keys without one keep theirs.
        line: Format of a line.
    """
    return [
        line.format(key=(named or {}).get(key, key), old=old.get(key), new=new.get(key))
        for key in ({**old, **new} if keys is None else keys)
        if compared(key, old.get(key)) != compared(key, new.get(key))
    ]


def refusal(
    place: Path | str, holds: str, changed: Sequence[str], *, instead: str = OR_FRESH
) -> str:
    """Return the message that refuses a folder with other settings.

    Args:
        place: Path of the folder.
        holds: Describes the folder's content, such as ``holds a run with other settings``.
        changed: The differences, one line each.
        instead: Advice for the user.
    """
    return f"{place} {holds}:{''.join(f'{_LINE_START}{line}' for line in changed)}\n{instead}"


class Lockable(Protocol):
    """A folder that one process at a time may write to."""

    path: Path

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder; raise RunFolderError if another process holds the lock."""
        ...


def aside_name(name: str) -> str:
    """Return a folder's name, or its address, plus the current time."""
    return f"{name}.{time.strftime('%Y%m%d-%H%M%S')}"


def set_aside(folder: Lockable) -> Path:
    """Rename a folder to its name plus the current time, to free its name.

    Folders set aside within one second get ``-2``, ``-3``, ... behind it.

    Returns:
        The new path.

    Raises:
        RunFolderError: If another process holds the folder's lock.
    """
    with folder.locked():
        aside = folder.path.with_name(aside_name(folder.path.name))
        named, number = aside.name, 2
        while aside.exists():
            aside, number = aside.with_name(f"{named}-{number}"), number + 1
        folder.path.rename(aside)
    return aside
