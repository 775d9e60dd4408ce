"""Find settings without effect: the user sets them, but another setting makes them ineffective.

A setting at its default is never reported, because a run folder's file contains all defaults.
Configurations come in layers: a file over the file that it extends, overrides over the file, the
space of a sweep over its ``set`` over the base. If an upper layer makes a setting of a lower layer
idle, the setting is dropped, like the settings of a section whose ``name`` changes. A setting that
its own layer makes idle, or that was idle already, is a problem.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from raysl.config.base import GIVEN, Config, Idle
from raysl.config.load import (
    MISSING,
    Problem,
    bad_keys,
    drop_key,
    get_key,
    models_in,
    plain_copy,
    tags_of,
)

_UNITS = {"steps", "epochs", "fraction"}


def idle_settings(
    model: type[BaseModel], values: Mapping[str, Any], *, within: tuple[str, ...] = ()
) -> Iterator[Problem]:
    """Yield the settings without effect.

    Args:
        model: The model of the values.
        values: Plain values, possibly incomplete or invalid; undecidable cases are not reported.
        within: Keys of the sections around the values, from the top.
    """
    if not issubclass(model, Config):
        return
    for rule in model.idle:
        if all(_is_off(model, values, key, off) for key, off in rule.off.items()):
            for name in rule.settings:
                if _is_given(model, values, name):
                    yield _problem(within, name, values, _because(model, values, rule, within))
    for name, why in model.idle_by(values):
        if _is_given(model, values, name):
            yield _problem(within, name, values, f"{why}; drop it")
    for name, value in values.items():
        if name in model.model_fields:
            yield from _inside(models_in(model.model_fields[name].annotation), value, within, name)


def refuse_idle(model: type[BaseModel], values: Mapping[str, Any], *, where: str) -> None:
    """Reject settings without effect.

    Args:
        model: The model of the values.
        values: Plain values given by the user.
        where: Name of the file or command for the error message.

    Raises:
        ConfigError: If there are any; the message lists all.
    """
    if problems := list(idle_settings(model, values)):
        raise bad_keys(problems, where=where)


def without_idle(
    model: type[BaseModel],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    given: Collection[str],
) -> dict[str, Any]:
    """Return the values after a layer, without settings of lower layers that the layer made idle.

    Args:
        model: The model of the values.
        before: Values of the lower layers.
        after: Values of the lower layers with this layer applied.
        given: Dotted keys that this layer sets.
    """
    idle_before = {problem.place for problem in idle_settings(model, before)}
    result = plain_copy(after)
    for problem in list(idle_settings(model, after)):
        key = ".".join(problem.place)
        if problem.place not in idle_before and not any(_covers(each, key) for each in given):
            drop_key(result, key)
    return result


def dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every plain value that is not a section."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key)


def _covers(given: str, key: str) -> bool:
    return key == given or key.startswith(given + ".") or given.startswith(key + ".")


def _inside(
    models: list[type[BaseModel]], value: Any, within: tuple[str, ...], name: str
) -> Iterator[Problem]:
    """Check a section, or a list of sections."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _inside(models, entry, (*within, name), str(index))
    elif isinstance(value, dict) and models:
        tags = {value[tag] for tag in ("name", "recipe", "op") if isinstance(value.get(tag), str)}
        matching = [model for model in models if tags & set(tags_of(model))]
        yield from idle_settings((matching or models)[0], value, within=(*within, name))


def _value(model: type[BaseModel], values: Mapping[str, Any], key: str) -> Any:
    """Return a plain value, or the model's default if the key is missing."""
    value = get_key(values, key)
    return _default(model, key) if value is MISSING else value


def _default(model: type[BaseModel], key: str) -> Any:
    name, _, rest = key.partition(".")
    field = model.model_fields.get(name)
    if field is None:
        return MISSING
    default = MISSING if field.is_required() else field.get_default(call_default_factory=True)
    if not rest:
        return default if default is MISSING else to_jsonable_python(default)
    sections = [type(default)] if isinstance(default, BaseModel) else models_in(field.annotation)
    return _default(sections[0], rest) if sections else MISSING


def _is_off(
    model: type[BaseModel], values: Mapping[str, Any], key: str, off: tuple[Any, ...]
) -> bool:
    value = _value(model, values, key)
    if value is MISSING:
        return False
    if isinstance(value, dict) and _UNITS & set(value) and 0 in off:  # a duration
        return not any(value.get(unit) for unit in _UNITS)
    return any(value is not None if each is GIVEN else bool(value == each) for each in off)


def _is_given(model: type[BaseModel], values: Mapping[str, Any], key: str) -> bool:
    """Return whether a setting is set and differs from its default."""
    value = get_key(values, key)
    if value is MISSING or value is None:
        return False
    return bool(_without_null(value) != _without_null(_default(model, key)))


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    return value


def _problem(within: tuple[str, ...], name: str, values: Mapping[str, Any], why: str) -> Problem:
    place = (*within, *name.split("."))
    value = format_value(get_key(values, name))
    return Problem(place, f"{'.'.join(place)}={value} does nothing {why}")


def _because(
    model: type[BaseModel], values: Mapping[str, Any], rule: Idle, within: tuple[str, ...]
) -> str:
    dots = "".join(f"{key}." for key in within)
    switches = [f"{dots}{key}={format_value(_value(model, values, key))}" for key in rule.off]
    others = {key: _others(model, key, off) for key, off in rule.off.items()}
    cures = [
        f"set {dots}{key}={text}"
        if text
        else f"{'give' if rule.off[key] == (None,) else 'change'} {dots}{key}"
        for key, text in others.items()
    ]
    cure = " or ".join(cures)
    return f"with {' and '.join(switches)}; drop it, or {cure}"


def _others(model: type[BaseModel], key: str, off: tuple[Any, ...]) -> str:
    """Return the other values of a switch, as text; "" if they are not a short list."""
    field = model.model_fields.get(key)
    if field is None:
        return ""
    kind = field.annotation
    allowed = [True, False] if kind is bool else list(get_args(kind)) if _is_literal(kind) else []
    return " or ".join(format_value(value) for value in allowed if value not in off)


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def format_value(value: Any) -> str:
    """Format a plain value as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        inside = ", ".join(f"{k}: {format_value(v)}" for k, v in value.items() if v is not None)
        return f"{{{inside}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
