"""Claim a sweep's folder, and reject another sweep of the same name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysl.config.load import read_mapping, to_yaml, validate
from raysl.errors import RunFolderError
from raysl.folder.claim import ANOTHER_NAME, changes, refusal
from raysl.folder.whole import write_text
from raysl.run.environment import flat
from raysl.sources.place import as_place
from raysl.sweep.config import SweepConfig
from raysl.sweep.sources import IF_CHANGED
from raysl.sweep.trial import SweepFolder

# What may change from one start of a sweep to the next.
_FREE = ("budget", "resources", "retries", "track", "output_dir", "metric")


def claim(folder: SweepFolder, sweep: SweepConfig) -> None:
    """Write the configuration into a new folder, or what may change into the sweep's own.

    Raises:
        RunFolderError: If the folder holds another sweep.
    """
    values = sweep.model_dump(mode="json")
    if folder.config.exists():
        # A setting that is newer than the folder has its default there.
        kept = validate(SweepConfig, read_mapping(folder.config), where=str(folder.config))
        old, new = (_without_folders(each) for each in (kept.model_dump(mode="json"), values))
        keys = [key for key in sorted({*old, *new}) if key.split(".")[0] not in _FREE]
        changed = changes(old, new, keys=keys)
        if changed:
            text = refusal(folder.path, "holds another sweep", changed, instead=ANOTHER_NAME)
            raise RunFolderError(text)
    write_text(folder.config, to_yaml(values))


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings flat, bases by their names, images by their places.

    A job's working folder is another one each time.
    """
    found = flat({**values, "base": [Path(base).name for base in values["base"]]})
    found.pop(f"set.{IF_CHANGED}", None)  # is there to change
    return {key: as_place(key.rpartition(".")[2], value) for key, value in found.items()}
