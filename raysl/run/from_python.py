"""`raysl.pretrain`: the verb as a function, for notebooks and scripts."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysl.config.idle import dotted_keys
from raysl.config.load import EXTENDS, apply_overrides, merge, parse_override, plain_copy
from raysl.config.shipped import find_config
from raysl.folder.address import path_or_address
from raysl.run.pretrain import train_run
from raysl.run.recipe import RunConfig, drop_idle, load_run, read_run_values, run_from_user
from raysl.run.shell import Typed
from raysl.store.reading import local_copy
from raysl.track.results import Results

_WHERE = "raysl.pretrain"


def pretrain(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    fresh: bool = False,
    extend: bool = False,
) -> Results:
    """Train or resume a run, as ``raysl pretrain`` does.

    Args:
        config: A YAML file, its address in a store, the name of a shipped configuration, or a
            mapping of settings, which may extend a file or a name (``{"extends": "quickstart",
            "name": "mine"}``).
        overrides: Dotted settings, as ``["train.epochs=5"]`` or ``{"train.epochs": 5}``.
        fresh: Start again from step 0; the folder of an earlier run is renamed.
        extend: Continue an earlier run to the larger length given here.

    Returns:
        The results, as ``raysl pretrain --json`` prints them; ``run_dir`` is the run folder.

    Raises:
        ConfigError: Lists every bad setting at once.
        RayslError: If the run fails otherwise; the subclass names the kind of failure.
    """
    began_at = time.time()
    texts = _texts_of(overrides)
    if isinstance(config, Mapping):
        return train_run(_run_of(config, texts), began_at=began_at, fresh=fresh, extend=extend)
    place = path_or_address(config) if isinstance(config, str) else config
    return train_run(
        load_run(local_copy(place), texts),
        began_at=began_at,
        typed=Typed(place, tuple(texts)),
        fresh=fresh,
        extend=extend,
    )


def _texts_of(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return overrides as they are typed in a shell."""
    if isinstance(overrides, Mapping):
        values = plain_copy(overrides).items()
        # JSON is YAML.
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values]
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _run_of(settings: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig[Any]:
    """Build the run from its parent configuration, these settings and the overrides."""
    layer = plain_copy(settings)
    parent = layer.pop(EXTENDS, None)
    parent_values = {} if parent is None else read_run_values(find_config(str(parent)))
    values = drop_idle(parent_values, merge(parent_values, layer), list(dotted_keys(layer)))
    keys = [parse_override(override)[0] for override in overrides]
    values = drop_idle(values, apply_overrides(values, overrides), keys)
    return run_from_user(values, where=" ".join([_WHERE, *overrides]))
