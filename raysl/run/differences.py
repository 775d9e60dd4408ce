"""List the settings that differ between the start of a run and its resume."""

from collections.abc import Mapping
from typing import Any

from raysl.folder.claim import changes
from raysl.sources.place import as_place
from raysl.train.loop import CHECKPOINT_KEYS

# Settings that may change between a run's start and its resume: where it runs and what it reports.
FREE_SECTIONS = ("cluster", "track", "output_dir", "evaluate", "health")
FREE_KEYS = {
    "train": ("log_every", *CHECKPOINT_KEYS),
    "data": ("bad_images", "if_changed"),
}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the changed settings that must not change between start and resume, one line each.

    Sources are compared by absolute path.
    """
    lines: list[str] = []
    for section in sorted({*old, *new} - set(FREE_SECTIONS)):
        before, after = old.get(section), new.get(section)
        if isinstance(before, dict) and isinstance(after, dict):
            keys = sorted({*before, *after} - set(FREE_KEYS.get(section, ())))
            changed = changes(before, after, keys=keys, compared=as_place)
            lines += [f"{section}.{line}" for line in changed]
        else:
            lines += changes(old, new, keys=[section])
    return lines
