"""What population based training changed of a trial while it was under way, and from where on.

A trial's weights are those of the settings that trained them, not of those drawn for it at first,
nor of those given to it with which no step was trained yet.
"""

from typing import Any, NamedTuple

from raysl.folder.whole import read_json, write_json
from raysl.track.run_folder import RunFolder


class Change(NamedTuple):
    """Settings from a step on."""

    after_step: int
    """The next step is the first that they train."""
    params: dict[str, Any]
    """Dotted setting to what people see of its value."""
    values: dict[str, Any]
    """Dotted setting to its value."""


def write_change(folder: RunFolder, change: Change) -> None:
    """Keep settings that a trial trains with from here on; later ones that were kept are void."""
    kept = [each for each in _read(folder) if each.after_step < change.after_step]
    if not kept or kept[-1].params != change.params:
        kept.append(change)
    write_json(folder.path / "changes.json", {"changes": [each._asdict() for each in kept]})


def newest_change(folder: RunFolder) -> Change | None:
    """Return the settings that a trial goes on with, or None if it has those drawn for it."""
    return next(reversed(_read(folder)), None)


def change_behind(folder: RunFolder, step: int) -> Change | None:
    """Return the settings that trained a step, or None if they are those drawn for the trial."""
    return next((each for each in reversed(_read(folder)) if each.after_step < step), None)


def _read(folder: RunFolder) -> list[Change]:
    kept = read_json(folder.path / "changes.json") or {}
    return [Change(**each) for each in kept.get("changes", ())]
