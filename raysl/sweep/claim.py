"""Write the configuration into a sweep's folder; reject another sweep of the same name."""

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

# Sections that may change from one start of a sweep to the next.
_FREE = ("budget", "resources", "retries", "track", "output_dir", "metric")


def claim(folder: SweepFolder, sweep: SweepConfig) -> None:
    """Write the configuration into the folder, which is new or belongs to the same sweep.

    Raises:
        RunFolderError: If the folder holds another sweep.
    """
    values = sweep.model_dump(mode="json")
    if folder.config.exists():
        # Validation gives settings that are newer than the folder their defaults.
        earlier = validate(SweepConfig, read_mapping(folder.config), where=str(folder.config))
        old, new = (_comparable(each) for each in (earlier.model_dump(mode="json"), values))
        keys = [key for key in sorted({*old, *new}) if key.split(".")[0] not in _FREE]
        changed = changes(old, new, keys=keys)
        if changed:
            text = refusal(folder.path, "holds another sweep", changed, instead=ANOTHER_NAME)
            raise RunFolderError(text)
    write_text(folder.config, to_yaml(values))


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings with names of base files and absolute paths of images.

    Folders of base files are left out, since each job has another working folder.
    """
    settings = flat({**values, "base": [Path(base).name for base in values["base"]]})
    settings.pop(f"set.{IF_CHANGED}", None)  # may change
    return {key: as_place(key.rpartition(".")[2], value) for key, value in settings.items()}
