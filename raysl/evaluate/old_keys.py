"""Translate the keys of the section ``evaluate`` from earlier versions.

Up to version 0.1, the evaluation at the end of a run had its own settings and result names. Now
both are those of the protocols in :mod:`raysl.evaluate.registry`. :func:`rename_old_keys` renames
each layer of a configuration when it is read. :func:`resolve_final` runs after all layers are
merged, because the meaning of ``evaluate.finetune`` depends on the merged ``evaluate.final``.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from raysl.config.load import MISSING, drop_key, get_key, plain_copy, set_key
from raysl.errors import ConfigError
from raysl.evaluate.registry import FINAL

_SECTION = "evaluate"


def _unchanged(value: Any) -> Any:
    return value


def _as_list(value: Any) -> list[Any]:
    return [value]


_RENAMED: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "knn_k": {"knn.k": _unchanged},
    "knn_temperature": {"knn.temperature": _unchanged},
    "few_shot_labels": {"few_shot.labels_per_class": _unchanged},
    "few_shot_draws": {"few_shot.draws": _unchanged},
    "inverse_penalty": {
        "linear_lbfgs.inverse_penalties": _as_list,
        "few_shot.inverse_penalty": _unchanged,
    },
    "finetune.seed": {"seeds": _as_list},
}
"""Old key -> new keys, each with the function that converts the old value."""

WORDS: Mapping[str, tuple[str, ...]] = {"knn": ("knn",), "full": FINAL}
"""Old values of ``evaluate.final`` and of a sweep's ``final``, and the protocols they stand for.
With one of these values, or without ``final``, ``evaluate.finetune: {...}`` fine-tunes, by default
with a tenth of the labels and seed 0."""

_MOMENTUM = ("finetune.sgd_momentum", 0.9)  # the old default, which is fixed now


def new_keys(key: str) -> list[str]:
    """Return the new dotted keys of an old key such as ``evaluate.knn_k``; of others the key."""
    section, _, name = key.partition(".")
    new = _RENAMED.get(name, {}) if section == _SECTION else {}
    return [f"{_SECTION}.{each}" for each in new] or [key]


def rename_old_keys(values: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """Return plain values of a run with the new names of old keys.

    Args:
        values: Plain values of a run, with or without the section ``evaluate``.
        given: Dotted keys of the newest layer. If it sets both an old key and its new name, the old
            key is left, so that validation rejects it as unknown.
    """
    if not isinstance(values.get(_SECTION), dict):
        return dict(values)
    result = plain_copy(values)
    section = result[_SECTION]
    for old, new in _RENAMED.items():
        value = get_key(section, old)
        if value is MISSING or any(f"{_SECTION}.{key}" in given for key in new):
            continue
        drop_key(section, old)
        for key, convert in new.items():
            with suppress(ConfigError):  # the parent key is not a section; validation rejects it
                set_key(section, key, convert(value))
    if get_key(section, _MOMENTUM[0]) == _MOMENTUM[1]:
        drop_key(section, _MOMENTUM[0])
    return result


def resolve_final(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values of a run with ``evaluate.final`` as a list of protocols, if it is set."""
    result = rename_old_keys(values)
    section = result.get(_SECTION)
    if not isinstance(section, dict):
        return result
    section = result[_SECTION] = dict(section)
    final = section.get("final", MISSING)
    finetune = section.get("finetune", MISSING)
    if finetune is None:
        del section["finetune"]
        if isinstance(final, list):
            section["final"] = [name for name in final if name != "finetune"]
    if isinstance(final, str):
        section["final"] = list(WORDS.get(final, (final,)))
        if final == "knn" and section.get("pixel_baseline") is True:
            del section["pixel_baseline"]  # old run folders contain it; it had no effect
    if isinstance(finetune, dict) and (final is MISSING or isinstance(final, str)):
        section["final"] = [*section.get("final", FINAL), "finetune"]
        section["finetune"] = {"label_fraction": 0.1} | finetune
        section.setdefault("seeds", [0])
    return result
