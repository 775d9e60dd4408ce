"""Whose a folder is: what differs from what it was begun with, its refusal, and setting it aside.

Each kind of folder keeps what it was begun with in a file of its own, and knows which of it may
change; here is what they have in common.
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
    """List what differs between what a folder was begun with and what is asked for, a line each.

    Args:
        old: Of the folder.
        new: Of the command.
        keys: Which to compare, in this order; all of both if it is None. What is missing is None.
        compared: What to compare of a value, by key; relative paths may mean the same place.
        named: What to call a key.
        line: How to say it.
    """
    return [
        line.format(key=(named or {}).get(key, key), old=old.get(key), new=new.get(key))
        for key in ({**old, **new} if keys is None else keys)
        if compared(key, old.get(key)) != compared(key, new.get(key))
    ]


def refusal(
    place: Path | str, holds: str, changed: Sequence[str], *, instead: str = OR_FRESH
) -> str:
    """Return the message that refuses a folder of something else.

    Args:
        place: The folder.
        holds: Says of what it is, such as ``holds a run with other settings``.
        changed: What differs, a line each.
        instead: What to do.
    """
    return f"{place} {holds}:{''.join(f'{_INDENTED}{line}' for line in changed)}\n{instead}"


class Holdable(Protocol):
    """A folder that one process at a time writes to."""

    path: Path

    def locked(self) -> AbstractContextManager[None]:
        """Hold it; raise RunFolderError if another process does."""
        ...


def set_aside(folder: Holdable) -> Path:
    """Rename a folder that something else is to take the place of, to its name and the time.

    Returns:
        Its new name.

    Raises:
        RunFolderError: If a process writes to it.
    """
    with folder.locked():
        aside = folder.path.with_name(f"{folder.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.path.rename(aside)
    return aside
