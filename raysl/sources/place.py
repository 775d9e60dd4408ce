"""Resolve relative paths of sources, so that a source has the same name in every folder.

Only this module interprets relative paths of images.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs

from raysl.config.base import Config
from raysl.errors import DataError
from raysl.sources.filter import Condition, is_list_file
from raysl.sources.source import BUILT_IN
from raysl.sources.storage import list_glob, resolve
from raysl.sources.tar import expand_braces
from raysl.track.run_folder import JOB_FOLDER, working_folder

C = TypeVar("C", bound=Config)

_ROOT = "torchvision_root"
_SOURCES = ("source", "test_source", _ROOT)
_SIGNS = re.compile(r"[*?\[{]")
_IN_JOB = re.compile(rf"^.*{JOB_FOLDER}[^/]+/[^/]+/")


def absolute_source(source: str, *, first: Sequence[Path] = ()) -> str:
    """Return a source's absolute name.

    Built-in sets and URIs are unchanged; ``file://`` becomes a path. A relative path is looked up
    in ``first``, in the current folder, then in the folder of the runs. If it exists in none, it is
    relative to the current folder. Globs and ranges keep their pattern.

    Args:
        source: The source as configured.
        first: Folders to look in first.
    """
    if source.startswith("file://"):
        try:
            return _tidy(resolve(source)[1])
        except DataError:  # reported when it is opened
            return source
    if source in BUILT_IN or "://" in source:
        return _without_slash(source)
    path, here = Path(source).expanduser(), Path.cwd()
    folders = list(dict.fromkeys([*first, here, working_folder()]))
    if path.is_absolute() or folders == [here]:
        return _tidy(str(here / path))
    return _tidy(str(next((f for f in folders if _is_there(f / path)), here) / path))


def absolute_conditions(
    conditions: Iterable[Condition], *, first: Sequence[Path] = ()
) -> tuple[Condition, ...]:
    """Return the conditions of a filter with absolute paths of their list files."""
    return tuple(
        (column, comparison, absolute_source(str(value), first=first))
        if is_list_file(comparison)
        else (column, comparison, value)
        for column, comparison, value in conditions
    )


def absolute_config(config: C, *, first: Sequence[Path] = ()) -> C:
    """Return a section whose sources are absolute, see :func:`absolute_source`.

    The sources are the fields ``source``, ``test_source`` and ``torchvision_root``, the list files
    of ``filter``, and those in ``mix``.
    """
    changed: dict[str, Any] = {}
    for name in _SOURCES:
        value = getattr(config, name, None)
        # A home folder does not depend on the current folder.
        if value is not None and not (name == _ROOT and value.startswith("~")):
            changed[name] = absolute_source(value, first=first)
    if conditions := getattr(config, "filter", ()):
        changed["filter"] = absolute_conditions(conditions, first=first)
    if parts := getattr(config, "mix", ()):
        changed["mix"] = tuple(absolute_config(part, first=first) for part in parts)
    changed = {name: value for name, value in changed.items() if value != getattr(config, name)}
    return config.model_copy(update=changed) if changed else config


def place_key(source: str) -> str:
    """Return a text that is equal for all names of the same place.

    Symbolic links are followed. Each start of a job unpacks its files into a new folder, so files
    in such a folder are identified by the path below it.
    """
    place = absolute_source(source)
    if not place.startswith("/"):
        return place
    return _IN_JOB.sub("JOB/", place) if JOB_FOLDER in place else os.path.realpath(place)


def as_place(key: str, value: Any) -> Any:
    """Return a setting for comparison, with :func:`place_key` in place of each source.

    Args:
        key: Name of the setting in its section.
        value: Plain value of the setting.
    """
    if key in _SOURCES and isinstance(value, str):
        return place_key(value)
    if key == "mix":
        return [{k: as_place(k, v) for k, v in part.items()} for part in value or ()]
    if key == "filter":
        return [_condition_as_place(condition) for condition in value or ()]
    return value


def _condition_as_place(condition: Any) -> Any:
    if len(condition) != 3 or not is_list_file(str(condition[1])):
        return list(condition)
    return [condition[0], condition[1], place_key(str(condition[2]))]


def _is_there(path: Path) -> bool:
    if path.exists():
        return True
    text = str(path)
    if not _SIGNS.search(text):
        return False
    try:
        if re.search(r"\{.*\}", text):
            return any(os.path.exists(each) for each in expand_braces(text))
        return bool(list_glob(pafs.LocalFileSystem(), text))
    except DataError:
        return False


def _tidy(path: str) -> str:
    """Normalise a path: remove a trailing slash, ``.`` and ``..``."""
    plain = os.path.normpath(path)
    plain = "/" + plain.lstrip("/")  # POSIX keeps two leading slashes
    # Without ".." after a symbolic link: it means the parent of the link's target.
    same = ".." not in Path(path).parts or os.path.realpath(plain) == os.path.realpath(path)
    return plain if same else str(Path(path))


def _without_slash(uri: str) -> str:
    scheme, sign, rest = uri.partition("://")
    return uri if "?" in rest else f"{scheme}{sign}{rest.rstrip('/')}"
