"""Which settings belong to one source of images, and leave with it when another one is named.

`raysl finetune RUN`, `distill` and `evaluate` begin with the settings of a run. What says which of
the source's images are meant, and how they are read, would mean something else, or nothing, of
another source.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysl.config.load import parse_override, plain_copy
from raysl.sources.place import absolute_source, place_key
from raysl.sources.source import DataConfig, SourceConfig

OF_SOURCE = (*SourceConfig.model_fields, "mix", "labels", "if_changed")
"""Of the section ``data``. The rest says how a method and its encoder see images, or how this
machine reads them, and stays: views, mean, std, the policy for bad images, folders, memory."""

OF_TEST_SOURCE = tuple(SourceConfig.model_fields)
"""Of the section ``evaluate``: how its ``source`` is read. They leave with the training images too:
the test images of others are of other classes."""

_SECTIONS = {"data": OF_SOURCE, "evaluate": OF_TEST_SOURCE}


def named_source(overrides: Sequence[str], key: str) -> str | None:
    """Return the source that overrides name, the last one of them; None if they name none.

    Args:
        overrides: ``section.key=value``.
        key: Of the source, such as ``data.source``; a whole section may be given, too.
    """
    section, _, name = key.partition(".")
    named: str | None = None
    for override in overrides:
        given, value = parse_override(override)
        if given == section and isinstance(value, Mapping):
            value = value.get(name)
        elif given != key:
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
    """Return the settings of a run without those of a source that another one takes the place of.

    Args:
        values: Plain values with the sections ``data`` and ``evaluate``.
        source: The training images that are named now, or None. One that lies at the same place as
            before is no other one.
        test_source: The test images that are named now, or None.
        first: Folders to look for the run's own relative sources in, before the current one.

    Returns:
        The settings, and ``key=value`` of each that was left out and said something.
    """
    kept = plain_copy(values)
    left: list[str] = []
    if _is_other(kept, "data", source, first):
        left += _drop(kept, "data") + _drop(kept, "evaluate")
    elif _is_other(kept, "evaluate", test_source, first):
        left += _drop(kept, "evaluate")
    return kept, left


def _is_other(
    values: Mapping[str, Any], section: str, named: str | None, first: Sequence[Path]
) -> bool:
    if named is None:
        return False
    known = (values.get(section) or {}).get("source")
    if not isinstance(known, str):
        return True
    return place_key(absolute_source(known, first=first)) != place_key(named)


def _drop(values: dict[str, Any], name: str) -> list[str]:
    """Take out of a section what belongs to its source; return what of it said something."""
    section = values.get(name)
    if not isinstance(section, dict):
        return []
    values[name] = {key: value for key, value in section.items() if key not in _SECTIONS[name]}
    return [
        f"{name}.{key}={section[key]}"
        for key in _SECTIONS[name]
        if (name, key) != ("data", "source") and _says_something(key, section.get(key))
    ]


def _says_something(key: str, value: Any) -> bool:
    field = DataConfig.model_fields[key]
    is_usual = not field.is_required() and value == field.default
    return not is_usual and value is not None and value != []
