"""Drop settings that belong to the previous source when a command names another source.

`raysl finetune RUN`, `distill` and `evaluate` start from the settings of a run. The settings that
select images of the run's source, or say how to read them, do not fit another source.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysl.config.load import parse_override, plain_copy
from raysl.sources.place import absolute_source, place_key
from raysl.sources.source import DataConfig, SourceConfig

OF_SOURCE = (*SourceConfig.model_fields, "mix", "labels", "if_changed")
"""Keys of the section ``data`` that are dropped. The other keys are kept: they describe the input
of the method and its encoder, or how this machine reads images (views, mean, std, the policy for
bad images, folders, memory)."""

OF_TEST_SOURCE = tuple(SourceConfig.model_fields)
"""Keys of the section ``evaluate`` that are dropped: how its ``source`` is read. New training
images also drop them, because the test images of another data set have other classes."""

_SECTIONS = {"data": OF_SOURCE, "evaluate": OF_TEST_SOURCE}


def named_source(overrides: Sequence[str], key: str) -> str | None:
    """Return the source named by the last override that names one; None if there is none.

    Args:
        overrides: Overrides in order, each ``section.key=value``.
        key: The setting, such as ``data.source``; an override may also set its whole section.
    """
    section, _, name = key.partition(".")
    named: str | None = None
    for override in overrides:
        override_key, value = parse_override(override)
        if override_key == section and isinstance(value, Mapping):
            value = value.get(name)
        elif override_key != key:
            continue
        named = None if value is None else str(value)
    return named


def without_other_source(
    values: Mapping[str, Any],
    *,
    source: str | None,
    test_source: str | None,
    first: Sequence[Path] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Drop the settings of a run that belong to a source which is being replaced.

    Args:
        values: Plain values with the sections ``data`` and ``evaluate``.
        source: Source of the new training images, or None. The same place as before does not count
            as new.
        test_source: Source of the new test images, or None.
        first: Folders in which the run's relative sources are looked up before the current folder.

    Returns:
        The remaining settings, and ``key=value`` of each dropped one that was not at its default.
    """
    remaining = plain_copy(values)
    dropped: list[str] = []
    if _is_other(remaining, "data", source, first):
        dropped += _drop(remaining, "data") + _drop(remaining, "evaluate")
    elif _is_other(remaining, "evaluate", test_source, first):
        dropped += _drop(remaining, "evaluate")
    return remaining, dropped


def _is_other(
    values: Mapping[str, Any], section: str, named: str | None, first: Sequence[Path]
) -> bool:
    if named is None:
        return False
    current = (values.get(section) or {}).get("source")
    if not isinstance(current, str):
        return True
    return place_key(absolute_source(current, first=first)) != place_key(named)


def _drop(values: dict[str, Any], name: str) -> list[str]:
    """Remove a section's settings of its source; return those not at their default as text."""
    section = values.get(name)
    if not isinstance(section, dict):
        return []
    values[name] = {key: value for key, value in section.items() if key not in _SECTIONS[name]}
    return [
        f"{name}.{key}={section[key]}"
        for key in _SECTIONS[name]
        if (name, key) != ("data", "source") and _is_set(key, section.get(key))
    ]


def _is_set(key: str, value: Any) -> bool:
    field = DataConfig.model_fields[key]
    is_default = not field.is_required() and value == field.default
    return not is_default and value is not None and value != []
