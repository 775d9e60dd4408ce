"""Load a YAML file and dotted overrides into a validated model, with helpful errors."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raysl.config.shipped import find_config, near_names
from raysl.errors import ConfigError

EXTENDS = "extends"

M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: ``1e-3`` is a float (PyYAML's own resolver reads a string).

    A key that stands twice is an error, not a silent overwrite.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping and refuse a key given twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(
                    f"{node.start_mark.name}: key {key!r} stands twice in the section that begins "
                    f"at line {node.start_mark.line + 1}; keep one"
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that the loader would read as numbers, such as ``1e3``."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse one YAML document.

    Raises:
        ConfigError: If the text is not YAML; the message has the line.
    """
    try:
        loader = _Loader(text)
        loader.name = where
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file and what it extends into one mapping of plain values.

    ``extends: other.yaml`` names at most one parent, relative to the file, or a shipped
    configuration by its name. Sections of parent and child merge key by key; a value inside a
    section is replaced whole, and so is a section whose ``name`` or ``recipe`` changes.

    Raises:
        ConfigError: If a file is missing, is not YAML, is not a mapping, or extends itself.
    """
    merged: dict[str, Any] = {}
    for layer in read_layers(path):
        merged = merge(merged, layer)
    return merged


def read_layers(path: Path) -> list[dict[str, Any]]:
    """Read a YAML file and what it extends, as plain values; each one goes over those before it.

    Raises:
        ConfigError: As :func:`read_mapping`.
    """
    chain: list[Path] = []
    layers: list[dict[str, Any]] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in chain:
            raise ConfigError(f"{path}: 'extends' goes round in a circle at {following}")
        chain.append(following.resolve())
        values = _read_one(following)
        parent = values.pop(EXTENDS, None)
        layers.append(values)
        if parent is not None and not isinstance(parent, str):
            raise ConfigError(
                f"{following}: 'extends' names one file, as text; got {json.dumps(parent)}. Of "
                f"several, let each extend the next, and this file the first"
            )
        following = find_config(parent, beside=following.parent) if parent is not None else None
    return layers[::-1]


def _read_one(path: Path) -> dict[str, Any]:
    try:
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
    """Return what else may be meant by a file that is not there: its neighbours come first."""
    beside = [file.name for file in path.parent.glob("*.yaml")]
    if near := difflib.get_close_matches(path.name, beside, 1):
        return f"; did you mean {path.parent / near[0]}?"
    if path.is_absolute():  # that is no name
        return ""
    if names := near_names(path):
        return f"; did you mean {' or '.join(names)}, which raysl ships?"
    return "; `raysl config --list` names those that raysl ships"


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a child over its parent's, as :func:`read_mapping` has it."""
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

    The value is typed as YAML: ``a.b=0.1``, ``a.b={epochs: 5}``, ``a.b=[1, 2]``, ``a.b=null``. A
    number in the key is a place in a list: ``data.views.kinds.0.size_px=32``.

    Raises:
        ConfigError: If an override is not ``key=value`` or runs through a value.
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
    """Return a copy that shares nothing; what YAML has beyond JSON, such as dates, as text."""
    copy: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return copy


def parse_override(override: str) -> tuple[str, Any]:
    """Return the key and the value of ``section.key=value``.

    Raises:
        ConfigError: If it is of another form, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    return key, parse_yaml(text, where=f"override {override!r}")


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in plain values; sections that are not there are made.

    Args:
        values: Changed in place.
        key: ``section.key``; a number is a place in a list, one beyond its end adds to it.
        value: What to set.

    Raises:
        ConfigError: If the key runs through a value, or to no place of a list.
    """
    names = key.split(".")
    target: Any = values
    for depth, name in enumerate(names):
        last = depth == len(names) - 1
        if isinstance(target, list):
            place = _place_in(target, name, ".".join(names[:depth]), may_add=last)
            if place == len(target):
                target.append(None)
            at: Any = place
        elif isinstance(target, dict):
            at = name
        else:
            path = ".".join(names[:depth])
            raise ConfigError(f"{path} is the value {target!r}, no section")
        if last:
            target[at] = value
        elif isinstance(target, dict) and target.get(at) is None:
            target[at] = {}
        target = target[at]


def _place_in(items: Sequence[Any], name: str, path: str, *, may_add: bool) -> int:
    """Return the place in a list that a part of a dotted key names."""
    most = len(items) if may_add else len(items) - 1
    if not name.isdecimal() or int(name) > most:
        raise ConfigError(f"{path} is a list of {len(items)}; got the place {name!r} in it")
    return int(name)


MISSING = object()
"""What :func:`get_key` returns where there is nothing; null is something."""


def get_key(values: Any, key: str) -> Any:
    """Return what a dotted key names in plain values, or :data:`MISSING`."""
    for name in key.split("."):
        if isinstance(values, dict) and name in values:
            values = values[name]
        elif isinstance(values, list) and name.isdecimal() and int(name) < len(values):
            values = values[int(name)]
        else:
            return MISSING
    return values


def drop_key(values: Any, key: str) -> None:
    """Remove what a dotted key names from plain values, if it is there."""
    owner, _, name = key.rpartition(".")
    inside = get_key(values, owner) if owner else values
    if isinstance(inside, dict):
        inside.pop(name, None)
    elif isinstance(inside, list) and name.isdecimal() and int(name) < len(inside):
        del inside[int(name)]


class Problem(NamedTuple):
    """One thing that is wrong with plain values."""

    place: tuple[str, ...]
    """The keys that lead to it, as a person typed them; empty for what whole values have."""
    text: str
    """The key, what is allowed, what was given."""


def validate(model: type[M], values: Mapping[str, Any], *, where: str) -> M:
    """Validate plain values against a model.

    Raises:
        ConfigError: Lists every bad key at once: the key, what is allowed, what was given, and for
            an unknown key the nearest known one.
    """
    found = validated(model, values)
    if isinstance(found, list):
        raise bad_keys(found, where=where)
    return found


def bad_keys(problems: Sequence[Problem], *, where: str) -> ConfigError:
    """Return the error that lists all problems."""
    heading = f"{where}: {len(problems)} bad key{'s' if len(problems) > 1 else ''}"
    return ConfigError("\n".join([heading, *(f"  {problem.text}" for problem in problems)]))


def validated(model: type[M], values: Mapping[str, Any]) -> M | list[Problem]:
    """Return the model that plain values make, or all that is wrong with them."""
    try:
        # As JSON, because strict mode then still reads a list as a tuple and an int as a float.
        return model.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        found = error.errors(include_url=False)
        return [
            Problem(_place(model, raw), _describe(model, raw | {"msg": line}))
            for raw in found
            if not _follows_from_another(raw, found)
            for line in raw["msg"].split("\n")  # a rule between keys may find several things
        ]


def _follows_from_another(problem: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a list is called too short only because pydantic did not count its bad entries."""
    depth = len(problem["loc"])
    return problem["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == problem["loc"] for other in found
    )


def _place(model: type[BaseModel], problem: Mapping[str, Any]) -> tuple[str, ...]:
    location = problem["loc"]
    if problem["type"] == "extra_forbidden":
        return *_follow(model, location[:-1])[1], str(location[-1])
    return tuple(_follow(model, location)[1])


def _describe(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    location = problem["loc"]
    if problem["type"] == "extra_forbidden":
        owner, shown = _follow(model, location[:-1])
        known = sorted(owner.model_fields) if owner is not None else []
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        section = ".".join(shown) or "top level"
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
        given = problem["input"]
        given = (
            next((given[t] for t in ("name", "recipe", "op") if t in given), given)
            if isinstance(given, dict)
            else given
        )
        near = difflib.get_close_matches(str(given), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}: got {given!r}, allowed: {', '.join(allowed)}{hint}"
    if problem["type"] == "value_error":
        return f"{key}: {message}"
    given = problem["input"]
    if problem["type"] == "string_type" and isinstance(given, bool | int | float):
        kind = "a truth value" if isinstance(given, bool) else "a number"
        text = json.dumps(json.dumps(given))
        return (
            f"{key}: takes text, and {json.dumps(given)} without quotes is {kind}; in a file write "
            f"{location[-1]}: {text}, on the command line {key}='{text}'"
        )
    return f"{key}: {message}, got {json.dumps(problem['input'], default=str)}"


def _follow(
    model: type[BaseModel], location: Sequence[Any]
) -> tuple[type[BaseModel] | None, list[str]]:
    """Walk a pydantic location; return the model that owns its end and the keys a person typed."""
    current: list[type[BaseModel]] = [model]
    shown: list[str] = []
    keyed = False  # whether the next part is a key of a mapping
    for part in location:
        field = next((m.model_fields[part] for m in current if part in m.model_fields), None)
        if keyed:
            shown.append(str(part))
            keyed = False
        elif field is not None:
            shown.append(str(part))
            current = models_in(field.annotation)
            keyed = get_origin(field.annotation) is dict
        elif isinstance(part, int):
            shown.append(str(part))
        else:  # the tag of a union: not a key of the file, but it says which member is meant
            current = [m for m in current if part in tags_of(m)] or current
    return (current[0] if current else None), shown


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def tags_of(model: type[BaseModel]) -> list[str]:
    """Return the names by which a member of a union of sections is known."""
    fields = [model.model_fields[t] for t in ("name", "recipe", "op") if t in model.model_fields]
    return [str(value) for field in fields for value in get_args(field.annotation)]


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values as YAML, in the order given."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
