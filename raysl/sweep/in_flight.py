"""Record the settings that population based training changes during a trial.

A trial's results are reported with the settings that trained its weights, not with those drawn for
it initially, nor with new settings that have not trained a step yet.
"""

from typing import Any, NamedTuple

from raysl.folder.whole import read_json, write_json
from raysl.track.run_folder import RunFolder


class Change(NamedTuple):
    """Settings from a step on."""

    after_step: int
    """They apply to all steps after this one."""
    params: dict[str, Any]
    """Dotted settings and their displayed values."""
    values: dict[str, Any]
    """Dotted settings and their values."""


def write_change(folder: RunFolder, change: Change) -> None:
    """Record the settings that a trial trains with from here on; later records are dropped."""
    kept = [each for each in _read(folder) if each.after_step < change.after_step]
    if not kept or kept[-1].params != change.params:
        kept.append(change)
    write_json(folder.path / "changes.json", {"changes": [each._asdict() for each in kept]})


def newest_change(folder: RunFolder) -> Change | None:
    """Return the settings that a trial continues with; None if they are those drawn for it."""
    return next(reversed(_read(folder)), None)


def change_behind(folder: RunFolder, step: int) -> Change | None:
    """Return the settings that trained a step; None if they are those drawn for the trial."""
    return next((each for each in reversed(_read(folder)) if each.after_step < step), None)


def _read(folder: RunFolder) -> list[Change]:
    kept = read_json(folder.path / "changes.json") or {}
    return [Change(**each) for each in kept.get("changes", ())]
