"""Compare the settings of runs, with paths of images that do not depend on the current folder."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from raysl.config.load import read_mapping
from raysl.run.recipe import RunConfig, run_from_values
from raysl.sources.belonging import named_source, without_other_source
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


def left_with_source(
    origin: Path, overrides: Sequence[str], *, test_key: str, never: Collection[str] = ()
) -> str:
    """Return the line that says which settings of a run are left out with its images.

    Args:
        origin: A run folder, or a file in one.
        overrides: ``section.key=value``, which may name other images.
        test_key: What names other test images.
        never: Settings that are not taken over in any case.

    Returns:
        The line; empty if the images stay, or nothing of them was set.
    """
    folder = RunFolder(origin if origin.is_dir() else origin.parent)
    if not folder.config.exists():
        return ""
    values = read_mapping(folder.config)
    source = named_source(overrides, "data.source")
    _, left = without_other_source(
        values,
        source=source,
        test_source=named_source(overrides, test_key),
        first=started_from(folder, str(values.get("output_dir", "runs"))),
    )
    shown = [text for text in left if text.partition("=")[0] not in never]
    if not shown:
        return ""
    images = "data.source" if source is not None else test_key
    return (
        f"{images} names other images than {folder.path.name} has: its settings of the old ones "
        f"are left out: {', '.join(shown)}"
    )
