"""Compare the settings of a folder with those of a command, refuse the folder, or rename it.

Each kind of folder stores the settings it was created with in a file of its own, and knows which
of them may change. This module is what all kinds share.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

ANOTHER_NAME = "Give this one another name=..."
_INDENTED = "\n  "
OR_FRESH = f"{ANOTHER_NAME}, or --fresh to set the old one aside"


def _as_it_is(_: str, value: Any) -> Any:
    return value


def changes(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    keys: Iterable[str] | None = None,
    compared: Callable[[str, Any], Any] = _as_it_is,
    named: Mapping[str, str] | None = None,
    line: str = "{key}: {old} -> {new}",
) -> list[str]:
    """List the settings that differ between a folder and a command, one line each.

    Args:
        old: Settings of the folder.
        new: Settings of the command.
        keys: Keys to compare, in this order; None compares all keys. A missing value is None.
        compared: Maps a key and its value to what is compared, for example an absolute path.
        named: Names of keys in the lines.
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
        place: The folder.
        holds: Describes its content, such as ``holds a run with other settings``.
        changed: The differences, one line each.
        instead: What to do.
    """
    return f"{place} {holds}:{''.join(f'{_INDENTED}{line}' for line in changed)}\n{instead}"


class Holdable(Protocol):
    """A folder that one process at a time may write to."""

    path: Path

    def locked(self) -> AbstractContextManager[None]:
        """Lock it; raise RunFolderError if another process holds the lock."""
        ...


def set_aside(folder: Holdable) -> Path:
    """Rename a folder to its name plus the current time, to free its name.

    Returns:
        Its new name.

    Raises:
        RunFolderError: If another process holds its lock.
    """
    with folder.locked():
        aside = folder.path.with_name(f"{folder.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.path.rename(aside)
    return aside
