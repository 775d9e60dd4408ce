"""Load a sweep from a YAML file and dotted overrides, and report all problems at once."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raysl.config.idle import idle_settings
from raysl.config.load import (
    Problem,
    drop_key,
    parse_override,
    plain_copy,
    read_mapping,
    set_key,
    validated,
)
from raysl.config.shipped import find_config
from raysl.errors import ConfigError
from raysl.run.recipe import RunConfig
from raysl.sweep.check import all_problems
from raysl.sweep.config import SweepConfig
from raysl.sweep.problems import problems_error
from raysl.track.results import new_name

# Sections whose keys are dotted.
_DOTTED = ("set", "space")
# Sections that are replaced as a whole if their name changes, as with ``extends``.
_NAMED = ("scheduler", "search")
_MAX_REPAIRS = 5


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Load a sweep; its name defaults to the file's stem, and its base files are resolved.

    An override whose first part is a field of the sweep changes the sweep, such as
    ``budget.trials=20`` or ``space.optim.base_lr={log_uniform: [1e-4, 1e-1]}``; one of a run, such
    as ``data.source=FOLDER``, goes into ``set``.

    Args:
        path: The YAML file, or the name of a shipped one.
        overrides: Dotted settings.

    Raises:
        ConfigError: Lists all problems of the overrides, of the file, and of the runs, as far as
            the valid parts allow checking them.
    """
    where = " ".join([str(path), *overrides])
    path = find_config(path, kind="sweeps")
    values = read_mapping(path)
    values.setdefault("name", path.stem)
    problems = [problem for text in overrides for problem in _override(values, text)]
    _rename_metrics(values)
    if "base" in values:
        values["base"] = list(_base_files(values["base"], path.parent))
    result = validated(SweepConfig, values)
    problems += [problem.text for problem in idle_settings(SweepConfig, values)]
    if isinstance(result, SweepConfig):
        problems += all_problems(result)
        if not problems:
            return result
    else:
        problems += [problem.text for problem in result]
        problems += _hidden_problems(values, result)
    raise problems_error(problems, where=where)


def _rename_metrics(values: dict[str, Any]) -> None:
    """Rename metrics of earlier versions, whose sweeps say ``final: full``, to their new names."""
    metric = values.get("metric")
    if values.get("final") == "full" and isinstance(metric, dict):
        for key, value in metric.items():
            names = [new_name(str(name)) for name in value] if isinstance(value, list) else value
            metric[key] = new_name(names) if isinstance(names, str) else names


def _override(values: dict[str, Any], text: str) -> Iterator[str]:
    """Apply an override in place; yield its problems."""
    try:
        key, value = parse_override(text)
        first, _, rest = key.partition(".")
        if first in SweepConfig.model_fields and first in _DOTTED and rest:
            section = _section(values, first)
            if value is None and first == "space":
                section.pop(rest, None)
            else:
                section[rest] = value
        elif first in SweepConfig.model_fields:
            old = values.get(first)
            if rest == "name" and first in _NAMED and isinstance(old, dict):
                values[first] = {} if old.get("name") != value else old
            set_key(values, key, value)
        elif first in RunConfig.model_fields:
            _section(values, "set")[key] = value
        else:
            fields = sorted({*SweepConfig.model_fields, *RunConfig.model_fields})
            near = difflib.get_close_matches(first, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            yield f"override {text!r}: {first!r} is no setting of a sweep or of a run; {hint}"
    except ConfigError as error:
        text_in_one_line = " ".join(str(error).split())  # YAML's own errors have several lines
        is_named = text_in_one_line.startswith("override")
        yield text_in_one_line if is_named else f"override {text!r}: {text_in_one_line}"


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section to change; an unused one if it is invalid, which is reported elsewhere."""
    section = values.setdefault(name, {})
    return section if isinstance(section, dict) else {}


def _base_files(given: Any, folder: Path) -> Iterator[Any]:
    """Yield the base files, relative to the sweep's own folder; ``*`` matches existing names.

    A pattern without a match is yielded unchanged, and reported later as a missing file.
    """
    for each in given if isinstance(given, list) else [given]:
        if not isinstance(each, str):
            yield each
        elif "*" in each:
            matches = sorted((folder / each).parent.glob(Path(each).name))
            yield from (os.path.abspath(match) for match in matches or [folder / each])
        else:
            yield os.path.abspath(find_config(each, beside=folder))


def _hidden_problems(values: dict[str, Any], problems: Sequence[Problem]) -> list[str]:
    """Return the problems that remain when the invalid parts of a sweep are left out."""
    values = plain_copy(values)
    left_out: list[str] = []
    for _ in range(_MAX_REPAIRS):
        for problem in problems:
            left_out += _leave_out(values, problem.place)
        result = validated(SweepConfig, values)
        if isinstance(result, SweepConfig):
            return all_problems(result, invalid=left_out)
        problems = result
    return []


def _leave_out(values: dict[str, Any], place: tuple[str, ...]) -> list[str]:
    """Remove the subject of a problem; return the dimension that is removed with it."""
    if place[0] == "space" and len(place) > 1:
        values["space"].pop(place[1], None)
        return [place[1]]
    drop_key(values, ".".join(place))
    return []
