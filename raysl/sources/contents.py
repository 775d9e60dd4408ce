"""List a folder by kind: images, Parquet files, tar shards, and what is skipped and why."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from raysl.errors import counted
from raysl.sources.formats import (
    COMPRESSED_SUFFIXES,
    IMAGE_SUFFIXES,
    OPTIONAL_SUFFIXES,
    PARQUET_SUFFIXES,
    TAR_SUFFIXES,
    advice_on_suffix,
    missing_package,
    suffix_of,
)
from raysl.sources.storage import HIDDEN, list_files, readable

_SHOWN = 5


class Contents(NamedTuple):
    """The files below a folder, by kind: tables of ``path``, relative to it, and ``bytes``."""

    images: pa.Table
    parquet: pa.Table
    tars: pa.Table
    compressed: pa.Table
    """Compressed tar shards."""
    notes: tuple[str, ...]
    """Lines about other files, and about images whose library is missing."""


def list_by_kind(filesystem: pafs.FileSystem, root: str) -> Contents:
    """List the files below a folder by kind, recursively; skip names that start with a dot.

    Raises:
        DataError: If a folder cannot be listed.
    """
    return sort_by_kind(list_files(filesystem, root, ("",)))


def sort_by_kind(files: pa.Table) -> Contents:
    """Sort files into kinds by suffix.

    Args:
        files: Table of ``path`` (large_binary) and ``bytes``.
    """
    missing = tuple(suffix for suffix in OPTIONAL_SUFFIXES if missing_package(suffix))
    images = ending(files, tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in missing))
    parquet, tars = (
        _not_hidden(ending(files, suffixes)) for suffixes in (PARQUET_SUFFIXES, TAR_SUFFIXES)
    )
    compressed = ending(files, COMPRESSED_SUFFIXES)
    all_suffixes = (*IMAGE_SUFFIXES, *PARQUET_SUFFIXES, *TAR_SUFFIXES, *COMPRESSED_SUFFIXES)
    others = files.filter(pc.invert(_ends(files, all_suffixes)))
    notes = (*_unread_images(ending(files, missing)), *_about(others))
    return Contents(images, parquet, tars, compressed, notes)


def ending(files: pa.Table, suffixes: Sequence[str]) -> pa.Table:
    """Return the files with one of the suffixes, ignoring case."""
    return files.filter(_ends(files, suffixes))


def paths_below(files: pa.Table, root: str) -> list[str]:
    """Return the paths of listed files, with the folder ``root`` in front."""
    return [f"{root.rstrip('/')}/{name}" for name in names_of(files)]


def names_of(files: pa.Table) -> list[str]:
    """Return the relative paths of files as text."""
    return [readable(path) for path in files.column("path").to_pylist()]


def count_suffixes(files: pa.Table) -> dict[str, int]:
    """Count files by suffix, the most frequent first; "" stands for names without a dot."""
    base = pc.extract_regex(files.column("path").cast(pa.large_binary()), r"(?P<base>[^/]*)$")
    end = pc.extract_regex(pc.struct_field(base, "base"), r"(?P<end>(?:\.[^.]{1,8})?\.[^.]+)$")
    counts: dict[str, int] = {}
    for value in pc.value_counts(pc.struct_field(end, "end")).to_pylist():
        name = value["values"]
        suffix = "" if name is None else suffix_of("x" + name.decode(errors="replace"))
        counts[suffix] = counts.get(suffix, 0) + value["counts"]
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _ends(files: pa.Table, suffixes: Sequence[str]) -> pa.ChunkedArray:
    if not suffixes:
        return pc.match_substring_regex(files.column("path"), r"^\b$")
    endings = "|".join(re.escape(suffix) for suffix in suffixes)
    return pc.match_substring_regex(files.column("path"), rf"(?i)({endings})$")


def _not_hidden(files: pa.Table) -> pa.Table:
    hidden = pc.match_substring_regex(files.column("path"), rf"(^|/)[{re.escape(HIDDEN)}]")
    return files.filter(pc.invert(hidden))


def _unread_images(files: pa.Table) -> list[str]:
    names: dict[str, int] = {}
    for suffix, count in count_suffixes(files).items():
        name = missing_package(suffix) or suffix
        names[name] = names.get(name, 0) + count
    return [
        f"{counted(count, f'{name} image')} left out: pip install 'raysl[formats]' installs "
        f"their library"
        for name, count in names.items()
    ]


def _about(files: pa.Table) -> list[str]:
    """Describe other files: one line for each kind that may hold images, one for the rest.

    The rest are files that tools leave beside data (_SUCCESS, .crc), and metadata (.json, .txt).
    """
    kinds: dict[str, dict[str, int]] = {}
    rest: dict[str, int] = {}
    for suffix, count in count_suffixes(files).items():
        advice = advice_on_suffix(suffix)
        (rest if advice is None else kinds.setdefault(advice, {}))[suffix or "no suffix"] = count
    lines = [
        f"{_counted(counts)} left out: {about}"
        for about, counts in sorted(kinds.items(), key=lambda item: -sum(item[1].values()))
    ]
    if rest:
        lines.append(f"{_counted(rest)} left out: not named like images")
    return lines


def _counted(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    examples = ", ".join(f"{suffix} {count:,}" for suffix, count in list(counts.items())[:_SHOWN])
    more = ", ..." if len(counts) > _SHOWN else ""
    return f"{counted(total, 'file')} ({examples}{more})"
