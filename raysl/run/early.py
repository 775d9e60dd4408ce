"""Start the fork server of a command that will train on Ray before the command's own imports."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from raysl.config.load import apply_overrides, read_mapping
from raysl.config.shipped import find_config
from raysl.errors import RayslError
from raysl.folder.address import path_or_address
from raysl.run.forks import early_server

_WITHOUT_WORKERS = ("-h", "--help", "--dry-run")


def early_server_for(words: Sequence[str]) -> AbstractContextManager[None]:
    """Return a context for a command, with a fork server if the command seems to train on Ray.

    Args:
        words: The verb and its arguments. Mistakes in them are left to the command to report.
    """
    given = [word for word in words[1:] if not word.startswith("-")]
    if not given or any(word in _WITHOUT_WORKERS for word in words):
        return nullcontext()
    if words[0] == "sweep":
        return early_server()
    with suppress(RayslError):
        values = apply_overrides(_plain_values(given[0]), given[1:])
        if _trains_on_ray(values):
            return early_server(_modules_of(values))
    return nullcontext()


def _plain_values(origin: str) -> dict[str, Any]:
    """Return the settings of a configuration or of a run folder; nothing for one in a store."""
    path = path_or_address(origin)
    if isinstance(path, str):
        return {}
    return read_mapping(path / "config.yaml" if path.is_dir() else find_config(path))


def _trains_on_ray(values: Mapping[str, Any]) -> bool:
    cluster = values.get("cluster")
    return not isinstance(cluster, dict) or cluster.get("num_train_workers") != 0


def _modules_of(values: Mapping[str, Any]) -> list[str]:
    """Return the modules that the workers of this run import in addition to those of every run."""
    data = values.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    is_name = isinstance(source, str) and source.isidentifier() and not Path(source).exists()
    return ["raysl.sources.builtin"] if is_name else []
