"""The settings of a run, with its images named by places that are the same from every folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from raysl.config.load import read_mapping
from raysl.recipe import RunConfig, run_from_values
from raysl.sources.place import absolute_config
from raysl.track.run_folder import RunFolder

R = TypeVar("R", bound=RunConfig[Any])


def with_absolute_sources(config: R, *, first: Sequence[Path] = ()) -> R:
    """Return a run whose images are named by places that are the same from every folder.

    Args:
        config: The run.
        first: Folders to look for relative ones in, before the current one and where runs are.
    """
    data, evaluate = (absolute_config(each, first=first) for each in (config.data, config.evaluate))
    if data is config.data and evaluate is config.evaluate:
        return config
    return config.model_copy(update={"data": data, "evaluate": evaluate})


def read_run(folder: RunFolder) -> RunConfig[Any]:
    """Return the settings of a run out of its folder, its images by absolute places.

    Folders of earlier versions hold relative ones: of the folder that the run was started from.

    Raises:
        ConfigError: If the file is not there, or no run.
    """
    values = read_mapping(folder.config)
    config = run_from_values(values, where=str(folder.config))
    return with_absolute_sources(config, first=started_from(folder, config.output_dir))


def started_from(folder: RunFolder, output_dir: str) -> list[Path]:
    """Return the folder that a run was started from, if it can be told from where it lies."""
    parts = Path(output_dir).expanduser()
    above = folder.path.parent
    if parts.is_absolute() or above.parts[-len(parts.parts) :] != parts.parts:
        return []
    return [above.parents[len(parts.parts) - 1]] if parts.parts else [above]
