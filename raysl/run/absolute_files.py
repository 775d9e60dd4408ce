"""Resolve the files that a run starts from to absolute paths, for the workers."""

from pathlib import Path
from typing import Any

from raysl.errors import DataError
from raysl.run.places import with_absolute_sources
from raysl.run.recipe import RunConfig


def with_absolute_files(config: RunConfig[Any], home: Path) -> RunConfig[Any]:
    """Return the run with the files and images that it begins with by absolute paths.

    Workers have other folders, and so has whoever asks for the run next. These are the sources,
    ``backbone.weights``, and the head or teacher of methods that take one. A relative one is looked
    for in the current folder, then where runs are.

    Raises:
        DataError: If there is no such file or folder.
    """
    weights, method = config.backbone.weights, config.method
    found = {
        name: _absolute(f"method.{name}", getattr(method, name), home) for name in method.files
    }
    return with_absolute_sources(config).model_copy(
        update={
            "backbone": config.backbone.model_copy(
                update={"weights": _absolute("backbone.weights", weights, home)}
            ),
            "method": method.model_copy(update=found),
        }
    )


def _absolute(key: str, given: str | None, home: Path) -> str | None:
    if given is None:
        return None
    places = [folder / Path(given).expanduser() for folder in (Path.cwd(), home)]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise DataError(
            f"{key}={given}: no such file or folder (looked for "
            f"{' and '.join(dict.fromkeys(map(str, places)))}); give a run folder or a file of "
            f"weights"
        )
    return str(found)
