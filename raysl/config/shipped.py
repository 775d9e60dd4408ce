"""Find the configurations shipped with raysl by name: ``quickstart``, ``ten_minutes/simclr``."""

import difflib
import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# In a wheel, pyproject.toml stores the repository's configs/ in this folder.
_OF_WHEEL = _PACKAGE / "shipped_configs"
_OF_CHECKOUT = _PACKAGE.parent / "configs"
_SUFFIX = ".yaml"
_MOST_NEAR = 3


def shipped_configs() -> dict[str, Path]:
    """Return the shipped files by name: the path below ``configs`` without its suffix."""
    folder = _OF_WHEEL if _OF_WHEEL.is_dir() else _OF_CHECKOUT
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob(f"*{_SUFFIX}"))
    }


def find_config(given: str | Path, *, beside: Path = Path(), kind: str = "") -> Path:
    """Return an existing file, or else the shipped configuration of that name.

    Args:
        given: A path, or a name with or without ``.yaml``.
        beside: Folder that a relative path starts from.
        kind: Folder below ``configs`` that a name may omit, such as ``sweeps``.

    Returns:
        The file; if neither exists, the given path.
    """
    file = beside / given
    if file.exists() and not file.is_dir():
        return file
    name = Path(given).as_posix().removesuffix(_SUFFIX)
    shipped = shipped_configs()
    return shipped.get(f"{kind}/{name}" if kind else name) or shipped.get(name) or file


def near_names(given: Path) -> list[str]:
    """Return the names of shipped configurations most similar to a path, best match first."""
    names_by_stem: dict[str, list[str]] = {}
    for name in shipped_configs():
        names_by_stem.setdefault(name.rpartition("/")[2], []).append(name)
    wanted = given.name.removesuffix(_SUFFIX)
    near = difflib.get_close_matches(wanted, list(names_by_stem), _MOST_NEAR)
    return [name for stem in near for name in names_by_stem[stem]]


def first_clause(path: Path) -> str:
    """Return the start of a file's header comment, up to a full stop, colon or semicolon."""
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("# "))
    return re.split(r"[.:;](?:\s|$)", " ".join(header), maxsplit=1)[0]
