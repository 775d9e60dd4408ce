"""Load a YAML file and dotted overrides into a validated model, with helpful errors."""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from raysl.config.shipped import find_config, near_names
from raysl.config.yaml_text import parse_yaml
from raysl.errors import ConfigError

EXTENDS = "extends"
_LARGEST_INT = 2**63 - 1
_LARGEST_FLOAT, _SMALLEST_FLOAT = 3.4e38, 1.2e-38  # normal numbers of float32
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_MAX_BYTES = 1 << 20  # far beyond any configuration: a larger file is of another kind

M = TypeVar("M", bound=BaseModel)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file and the files that it extends into one mapping of plain values.

    ``extends: other.yaml`` names at most one parent, relative to the file, or a shipped
    configuration by its name. Sections of parent and child are merged key by key; a value within a
    section is replaced as a whole, and so is a section whose ``name`` or ``recipe`` changes.

    Raises:
        ConfigError: If a file is missing, is not YAML, is not a mapping, or extends itself.
    """
    merged: dict[str, Any] = {}
    for layer in read_layers(path):
        merged = merge(merged, layer)
    return merged


def read_layers(path: Path) -> list[dict[str, Any]]:
    """Read a YAML file and the files that it extends as plain values, the lowest layer first.

    Raises:
        ConfigError: See :func:`read_mapping`.
    """
    chain: list[Path] = []
    layers: list[dict[str, Any]] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in chain:
            raise ConfigError(f"{path}: 'extends' forms a cycle at {following}")
        chain.append(following.resolve())
        try:
            values = _read_one(following)
        except ConfigError as error:
            if len(chain) == 1:
                raise
            raise ConfigError(f"{chain[-2]}: extends: {error}") from None
        parent = values.pop(EXTENDS, None)
        layers.append(values)
        if parent is not None and not isinstance(parent, str):
            raise ConfigError(
                f"{following}: 'extends' names one file, as text; got {json.dumps(parent)}. To "
                f"extend several, let each file extend the next, and this file the first"
            )
        following = find_config(parent, beside=following.parent) if parent is not None else None
    return layers[::-1]


def _read_one(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            raise ConfigError(
                f"{path}: cannot be read: it is a folder; give the YAML file of a run"
            )
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ConfigError(
                f"{path}: {size:,} bytes are too many for a configuration, which has thousands; "
                f"give the YAML file of a run"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_near(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = parse_yaml(text, where=str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got {type(values).__name__}")
    return values


def _near(path: Path) -> str:
    """Return a hint for a missing file: a similar name in its folder, or of a shipped file."""
    beside = [file.name for file in path.parent.glob("*.yaml")]
    if near := difflib.get_close_matches(path.name, beside, 1):
        return f"; did you mean {path.parent / near[0]}?"
    if path.is_absolute():  # not a name of a shipped configuration
        return ""
    if names := near_names(path):
        return f"; did you mean {' or '.join(names)}, which raysl ships?"
    return "; `raysl config --list` names those that raysl ships"


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parent's values, overridden by a child's values; see :func:`read_mapping`."""
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_kind(old, value):
            merged[key] = {**old, **value}
        else:
            merged[key] = value
    return merged


def _same_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return all(new.get(tag, old.get(tag)) == old.get(tag) for tag in ("name", "recipe"))


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with dotted overrides such as ``optim.base_lr=3e-1`` applied in order.

    The value is YAML: ``a.b=0.1``, ``a.b={epochs: 5}``, ``a.b=[1, 2]``, ``a.b=null``. A number in
    the key is an index into a list: ``data.views.kinds.0.size_px=32``.

    Raises:
        ConfigError: If an override is not ``key=value``, or a part of the key is not a section.
    """
    result = plain_copy(values)
    for override in overrides:
        key, value = parse_override(override)
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, str):
            raise ConfigError(f"override {override!r}: {key} is a section; set {key}.KEY=VALUE")
        try:
            set_key(result, key, value)
        except ConfigError as error:
            raise ConfigError(f"override {override!r}: {error}") from None
    return result


def plain_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy, with values that JSON lacks, such as dates, converted to text."""
    copy: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return copy


def parse_override(override: str) -> tuple[str, Any]:
    """Return the key and the value of ``section.key=value``.

    Raises:
        ConfigError: If it has another form, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    return key, parse_yaml(text, where=f"override {override!r}")


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in plain values; missing sections are created.

    Args:
        values: Plain values, changed in place.
        key: ``section.key``; a number is an index into a list, and the list's length appends to it.
        value: The value to set.

    Raises:
        ConfigError: If a part of the key is not a section, or not an index of its list.
    """
    names = key.split(".")
    target: Any = values
    for depth, name in enumerate(names):
        last = depth == len(names) - 1
        if isinstance(target, list):
            index = _list_index(target, name, ".".join(names[:depth]), may_add=last)
            if index == len(target):
                target.append(None)
            step: Any = index
        elif isinstance(target, dict):
            step = name
        else:
            path = ".".join(names[:depth])
            raise ConfigError(f"{path} is the value {target!r}, not a section")
        if last:
            target[step] = value
        elif isinstance(target, dict) and target.get(step) is None:
            target[step] = {}
        target = target[step]


def _list_index(items: Sequence[Any], name: str, path: str, *, may_add: bool) -> int:
    """Return the list index that a part of a dotted key stands for."""
    most = len(items) if may_add else len(items) - 1
    if not name.isdecimal() or int(name) > most:
        raise ConfigError(f"{path} is a list of {len(items)} entries; got the index {name!r}")
    return int(name)


MISSING = object()
"""Result of :func:`get_key` for a missing key; None is the value null."""


def get_key(values: Any, key: str) -> Any:
    """Return the value of a dotted key in plain values, or :data:`MISSING`."""
    for name in key.split("."):
        if isinstance(values, dict) and name in values:
            values = values[name]
        elif isinstance(values, list) and name.isdecimal() and int(name) < len(values):
            values = values[int(name)]
        else:
            return MISSING
    return values


def drop_key(values: Any, key: str) -> None:
    """Remove a dotted key from plain values, if it exists."""
    owner, _, name = key.rpartition(".")
    section = get_key(values, owner) if owner else values
    if isinstance(section, dict):
        section.pop(name, None)
    elif isinstance(section, list) and name.isdecimal() and int(name) < len(section):
        del section[int(name)]


class Problem(NamedTuple):
    """One problem of plain values."""

    place: tuple[str, ...]
    """Keys from the top, as the user typed them; empty if the problem concerns several sections."""
    text: str
    """The message, with the key, the allowed values and the given value."""


def validate(model: type[M], values: Mapping[str, Any], *, where: str) -> M:
    """Validate plain values against a model.

    Raises:
        ConfigError: Lists every bad key with its allowed and its given value; for an unknown key,
            the most similar valid one.
    """
    config = validated(model, values)
    if isinstance(config, list):
        raise bad_keys(config, where=where)
    return config


def bad_keys(problems: Sequence[Problem], *, where: str) -> ConfigError:
    """Build the error that lists all problems."""
    heading = f"{where}: {len(problems)} bad key{'s' if len(problems) > 1 else ''}"
    return ConfigError("\n".join([heading, *(f"  {problem.text}" for problem in problems)]))


def validated(model: type[M], values: Mapping[str, Any]) -> M | list[Problem]:
    """Return the validated model, or all problems of the values."""
    if unusable := list(_unusable(values)):
        return unusable
    try:
        # From JSON, strict mode accepts a list for a tuple and an int for a float.
        return model.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        return [
            Problem(_place(model, raw), _describe(model, raw | {"msg": line}))
            for raw in errors
            if not _follows_from_another(raw, errors)
            for line in raw["msg"].split("\n")  # a rule between keys may report several problems
        ]


def _unusable(value: Any, place: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Yield a problem for each number that torch cannot hold and each text with control codes."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _unusable(each, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _unusable(each, (*place, str(index)))
    elif (reason := _why_unusable(value)) is not None:
        yield Problem(place, f"{'.'.join(place)}: {reason}")


def _why_unusable(value: Any) -> str | None:
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        return f"{float(min(value, 10**300)):.3g} is beyond {_LARGEST_INT:,}, the largest integer"
    if isinstance(value, float) and math.isfinite(value):
        if abs(value) > _LARGEST_FLOAT:
            return f"{value:g} is infinite in float32, whose largest number is {_LARGEST_FLOAT:g}"
        if 0.0 < abs(value) < _SMALLEST_FLOAT:
            return f"{value:g} is zero in float32; write 0, or at least {_SMALLEST_FLOAT:g}"
    if isinstance(value, str) and (found := _CONTROL.search(value)):
        return f"the text contains the character {found[0]!r}, which no name or path can have"
    return None


def _follows_from_another(error: Mapping[str, Any], errors: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether pydantic reports a list as too short only because it has bad entries."""
    depth = len(error["loc"])
    return error["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == error["loc"] for other in errors
    )


def _place(model: type[BaseModel], problem: Mapping[str, Any]) -> tuple[str, ...]:
    location = problem["loc"]
    if problem["type"] == "extra_forbidden":
        return *_follow(model, location[:-1])[1], str(location[-1])
    return tuple(_follow(model, location)[1])


def _describe(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    location = problem["loc"]
    if problem["type"] == "extra_forbidden":
        owner, keys = _follow(model, location[:-1])
        fields = sorted(owner.model_fields) if owner is not None else []
        near = difflib.get_close_matches(str(location[-1]), fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
        section = ".".join(keys) or "top level"
        return f"{section}: unknown key {str(location[-1])!r}; {hint}"
    key = ".".join(_follow(model, location)[1]) or "top level"
    if problem["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("union_tag_invalid", "literal_error"):
        allowed = re.findall(
            r"'([^']*)'",
            str(problem.get("ctx", {}).get("expected", ""))
            or str(problem.get("ctx", {}).get("expected_tags", "")),
        )
        value = problem["input"]
        value = (
            next((value[t] for t in ("name", "recipe", "op") if t in value), value)
            if isinstance(value, dict)
            else value
        )
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}: got {value!r}, allowed: {', '.join(allowed)}{hint}"
    if problem["type"] == "value_error":
        return f"{key}: {message}"
    value = problem["input"]
    if problem["type"] == "string_type" and isinstance(value, bool | int | float):
        kind = "a Boolean" if isinstance(value, bool) else "a number"
        text = json.dumps(json.dumps(value))
        return (
            f"{key}: takes text, but {json.dumps(value)} without quotes is {kind}; in a file write "
            f"{location[-1]}: {text}, on the command line {key}='{text}'"
        )
    return f"{key}: {message}, got {json.dumps(problem['input'], default=str)}"


def _follow(
    model: type[BaseModel], location: Sequence[Any]
) -> tuple[type[BaseModel] | None, list[str]]:
    """Follow a pydantic location; return the model at its end and the keys that the user typed."""
    current: list[type[BaseModel]] = [model]
    keys: list[str] = []
    is_key_next = False  # whether the next part is a key of a mapping
    for part in location:
        field = next((m.model_fields[part] for m in current if part in m.model_fields), None)
        if is_key_next:
            keys.append(str(part))
            is_key_next = False
        elif field is not None:
            keys.append(str(part))
            current = models_in(field.annotation)
            is_key_next = get_origin(field.annotation) is dict
        elif isinstance(part, int):
            keys.append(str(part))
        else:  # the tag of a union, which is not a key in the file, selects the member
            current = [m for m in current if part in tags_of(m)] or current
    return (current[0] if current else None), keys


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models of the sections that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def tags_of(model: type[BaseModel]) -> list[str]:
    """Return the values of ``name``, ``recipe`` or ``op`` that select this model in a union."""
    fields = [model.model_fields[t] for t in ("name", "recipe", "op") if t in model.model_fields]
    return [str(value) for field in fields for value in get_args(field.annotation)]
