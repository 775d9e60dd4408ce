"""Resolve the files that a run reads to absolute paths, for workers in other folders."""

from pathlib import Path
from typing import Any

from raysl.errors import DataError
from raysl.run.places import with_absolute_sources
from raysl.run.recipe import RunConfig


def with_absolute_files(config: RunConfig[Any], home: Path) -> RunConfig[Any]:
    """Return the run with absolute paths of its images, weights, and head or teacher.

    Workers, and later commands that read the run folder, have other current folders. A relative
    path is looked up in the current folder, then in ``home``.

    Args:
        config: The run.
        home: The folder that relative paths of output are relative to.

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
    candidates = [folder / Path(value).expanduser() for folder in (Path.cwd(), home)]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise DataError(
            f"{key}={value}: no such file or folder (looked for "
            f"{' and '.join(dict.fromkeys(map(str, candidates)))}); give a run folder or a file of "
            f"weights"
        )
    return str(path)
