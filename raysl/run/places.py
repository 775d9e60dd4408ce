"""Resolve the paths in a run's settings to absolute ones, and drop settings of other images."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from raysl.config.load import read_mapping
from raysl.errors import DataError
from raysl.folder.address import is_address
from raysl.run.recipe import RunConfig, run_from_values
from raysl.sources.belonging import named_source, without_other_source
from raysl.sources.place import absolute_config
from raysl.store.reading import local_copy
from raysl.track.run_folder import RunFolder

R = TypeVar("R", bound=RunConfig[Any])


def with_absolute_sources(config: R, *, first: Sequence[Path] = ()) -> R:
    """Return a run with absolute paths of its images.

    Args:
        config: The run's configuration.
        first: Folders in which relative paths are looked up before the current folder and the
            folder that holds ``output_dir``.
    """
    data, evaluate = (absolute_config(each, first=first) for each in (config.data, config.evaluate))
    if data is config.data and evaluate is config.evaluate:
        return config
    return config.model_copy(update={"data": data, "evaluate": evaluate})


def read_run(folder: RunFolder) -> RunConfig[Any]:
    """Read the settings of a run from its folder, with absolute paths of its images.

    Folders of earlier versions contain paths relative to the folder that the run was started in.

    Raises:
        ConfigError: If ``config.yaml`` is missing or not a run.
    """
    values = read_mapping(folder.config)
    config = run_from_values(values, where=str(folder.config))
    return with_absolute_sources(config, first=start_folder(folder, config.output_dir))


def start_folder(folder: RunFolder, output_dir: str) -> list[Path]:
    """Return the folder that a run was started in, as a list; empty if it cannot be derived.

    It is derived from the path of the run folder and ``output_dir``.
    """
    parts = Path(output_dir).expanduser()
    above = folder.path.parent
    if parts.is_absolute() or above.parts[-len(parts.parts) :] != parts.parts:
        return []
    return [above.parents[len(parts.parts) - 1]] if parts.parts else [above]


def dropped_settings_note(
    origin: Path, overrides: Sequence[str], *, test_key: str, never: Collection[str] = ()
) -> str:
    """Return a message that lists the settings dropped because the overrides name other images.

    Args:
        origin: A run folder, or a file in one.
        overrides: ``section.key=value``, which may name other images.
        test_key: The key that names other test images.
        never: Settings that are never inherited, and so not listed.

    Returns:
        The message; empty if no setting is dropped.
    """
    folder = RunFolder(origin if origin.is_dir() else origin.parent)
    if not folder.config.exists():
        return ""
    values = read_mapping(folder.config)
    source = named_source(overrides, "data.source")
    _, left_out = without_other_source(
        values,
        source=source,
        test_source=named_source(overrides, test_key),
        first=start_folder(folder, str(values.get("output_dir", "runs"))),
    )
    dropped = [text for text in left_out if text.partition("=")[0] not in never]
    if not dropped:
        return ""
    images = "data.source" if source is not None else test_key
    return (
        f"{images} names other images than {folder.path.name} uses; settings of the old images are "
        f"dropped: {', '.join(dropped)}"
    )


def with_absolute_files(config: RunConfig[Any], home: Path) -> RunConfig[Any]:
    """Return the run with absolute paths of its images, weights, and head or teacher.

    Workers, and later commands that read the run folder, have other current folders. A relative
    path is looked up in the current folder, then in ``home``.

    Args:
        config: The run's configuration.
        home: Base folder of relative output paths.

    Raises:
        DataError: If a file or folder does not exist.
    """
    weights, method = config.backbone.weights, config.method
    files = {
        name: _absolute(f"method.{name}", getattr(method, name), home) for name in method.files
    }
    return with_absolute_sources(config).model_copy(
        update={
            "backbone": config.backbone.model_copy(
                update={"weights": _absolute("backbone.weights", weights, home)}
            ),
            "method": method.model_copy(update=files),
        }
    )


def _absolute(key: str, value: str | None, home: Path) -> str | None:
    if value is None:
        return None
    if is_address(value):
        local_copy(value)  # raises if there is nothing
        return value
    candidates = [folder / Path(value).expanduser() for folder in (Path.cwd(), home)]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise DataError(
            f"{key}={value}: no such file or folder (looked for "
            f"{' and '.join(dict.fromkeys(map(str, candidates)))}); give a run folder or a file of "
            f"weights"
        )
    return str(path)
