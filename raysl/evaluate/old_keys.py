"""Keys of the section ``evaluate`` in earlier versions, and what they are called now.

Up to version 0.1 a run's end had settings and result names of its own; now they are those of the
protocols in :mod:`raysl.evaluate.registry`. Every layer of a run's configuration is renamed when it
is read (:func:`renamed`), and the words of ``evaluate.final`` are resolved when all layers lie over
each other (:func:`resolved`), because the meaning of ``evaluate.finetune`` depends on them.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from raysl.config.load import MISSING, drop_key, get_key, plain_copy, set_key
from raysl.errors import ConfigError
from raysl.evaluate.registry import FINAL

_SECTION = "evaluate"


def _same(value: Any) -> Any:
    return value


def _one(value: Any) -> list[Any]:
    return [value]


_RENAMED: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "knn_k": {"knn.k": _same},
    "knn_temperature": {"knn.temperature": _same},
    "few_shot_labels": {"few_shot.labels_per_class": _same},
    "few_shot_draws": {"few_shot.draws": _same},
    "inverse_penalty": {"linear_lbfgs.inverse_penalties": _one, "few_shot.inverse_penalty": _same},
    "finetune.seed": {"seeds": _one},
}
"""Old key -> new keys, and what turns the old value into each new one."""

WORDS: Mapping[str, tuple[str, ...]] = {"knn": ("knn",), "full": FINAL}
"""Old values of ``evaluate.final``, and of a sweep's ``final``. With them, and without any,
``evaluate.finetune: {...}`` fine-tunes, by default with a tenth of the labels and seed 0."""

_MOMENTUM = ("finetune.sgd_momentum", 0.9)  # what it was by default, and always is now


def new_keys(key: str) -> list[str]:
    """Return the dotted keys that a key of a run, ``evaluate.knn_k``, stands for now."""
    section, _, name = key.partition(".")
    new = _RENAMED.get(name, {}) if section == _SECTION else {}
    return [f"{_SECTION}.{each}" for each in new] or [key]


def renamed(values: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """Return plain values of a run with the new names of old keys.

    Args:
        values: Plain values with the section ``evaluate``, if they have one.
        given: Dotted keys of the newest layer. An old key that it gives beside its new name stays
            as it is, and is refused as unknown.
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
            with suppress(ConfigError):  # through a value that is no section, which is refused
                set_key(section, key, convert(value))
    if get_key(section, _MOMENTUM[0]) == _MOMENTUM[1]:
        drop_key(section, _MOMENTUM[0])
    return result


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values of a run in which ``evaluate.final`` is a list of protocols."""
    result = renamed(values)
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
            del section["pixel_baseline"]  # had no effect, and stands in old run folders
    if isinstance(finetune, dict) and (final is MISSING or isinstance(final, str)):
        section["final"] = [*section.get("final", FINAL), "finetune"]
        section["finetune"] = {"label_fraction": 0.1} | finetune
        section.setdefault("seeds", [0])
    return result
