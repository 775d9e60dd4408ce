"""Assign files to splits (train, validation, test) by common names.

Shards (Parquet, tar) follow the rules of Hugging Face's `datasets` (version 5.2, data_files.py):
``NAME-00000-of-00005``, else a word in a folder's name, else a word in the file's name. For image
folders, only the first level with several folders is examined: folders below it are classes, which
may have any name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from raysl.errors import DataError, counted

TRAIN, VALIDATION, TEST = "train", "validation", "test"
HELD_OUT = (VALIDATION, TEST)

_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "dev", "val"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
_SEPARATORS = "-._ 0-9"
_ANY = "|".join(_WORDS)
_WORD = re.compile(rf"(?:^|[{_SEPARATORS}])({_ANY})(?=$|[{_SEPARATORS}])", re.IGNORECASE)
# Stricter for image folders, where "bullet train" is a class.
_FOLDER = re.compile(
    rf"({_ANY})([{_SEPARATORS}]*(images|imgs|set|data))?[{_SEPARATORS}]*", re.IGNORECASE
)
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
# Names of folders of images, then of folders beside them with pixel-wise annotations.
_PICTURES = {"images", "image", "imgs", "img", "photos", "rgb", "jpegimages"}
_ANNOTATIONS = {
    *("masks", "mask", "labels", "label", "annotations", "segmentation", "segmentations", "seg"),
    *("segmentationclass", "segmentationobject", "gt", "ground_truth", "groundtruth", "depth"),
}


class Parts(NamedTuple):
    """The assignment of files to splits."""

    split_of: list[str | None]
    """The split of each file; None if it belongs to none."""
    names: tuple[str, ...]
    """Split names: train, validation, test, then others. Empty if all files are one set."""


class FolderLayout(NamedTuple):
    """The meaning of the folders above images."""

    above: str
    """Path of the first folder with several subfolders, with a trailing slash; "" for the root."""
    splits: dict[str, list[str]]
    """Subfolders of ``above`` by split, sorted by name; empty if they are not splits."""
    annotations: list[str]
    """Folders that look like masks of the images in other folders."""
    doubtful: list[str]
    """Folders that are named like splits but used as classes."""


def canonical(word: str) -> str | None:
    """Return the split that a word means, such as validation for "dev"; None for other words."""
    return _WORDS.get(word.lower())


def split_shards(paths: Sequence[str]) -> Parts:
    """Assign shards to splits by their paths below the source.

    The names of the first rule that yields a known split count. They are splits only if there are
    several, and if one is for training or every file belongs to one.
    """
    for rule in (_by_count, _by_folder, _by_name):
        splits = [rule(path) for path in paths]
        names = set(splits) - {None}
        if not names & set(_WORDS.values()):
            continue
        if len(names) > 1 and (TRAIN in names or None not in splits):
            return Parts(splits, _in_order(names))
        break
    return Parts([None] * len(paths), ())


def _by_count(path: str) -> str | None:
    match = _SHARD.match(path.rpartition("/")[2])
    return None if match is None else canonical(match[1]) or match[1]


def _by_folder(path: str) -> str | None:
    # In a partition such as split=train, the value counts.
    folders = (part.rpartition("=")[2] for part in path.split("/")[:-1])
    return next((word for folder in folders if (word := _word_in(folder))), None)


def _by_name(path: str) -> str | None:
    return _word_in(path.rpartition("/")[2])


def _word_in(name: str) -> str | None:
    match = _WORD.search(name)
    return None if match is None else canonical(match[1])


def _in_order(names: Sequence[str | None] | set[str | None]) -> tuple[str, ...]:
    first = [name for name in (TRAIN, *HELD_OUT) if name in names]
    return tuple(first + sorted(name for name in names if name is not None and name not in first))


def folder_layout(folders_below: Callable[[str], Sequence[str]]) -> FolderLayout:
    """Determine whether the first level with several folders holds splits, classes or annotations.

    Args:
        folders_below: Returns the names of a folder's subfolders that contain images at any depth.
            A folder is "" (the root) or a path with a trailing slash. If the folder itself contains
            images, the names include "".
    """
    above, level = "", list(folders_below(""))
    while len(level) == 1 and level[0] and canonical(level[0]) is None:
        above += level[0] + "/"
        level = list(folders_below(above))
    names = sorted(filter(None, level))
    splits = _splits_of(names)
    if splits:
        return FolderLayout(above, splits, [], [])
    names = sorted(filter(None, folders_below("")))
    lower = {name.lower() for name in names}
    masks = [name for name in names if name.lower() in _ANNOTATIONS]
    return FolderLayout(
        "",
        {},
        masks if masks and lower & _PICTURES else [],
        [name for name in names if _FOLDER.fullmatch(name)],
    )


def _splits_of(names: Sequence[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for name in names:
        match = _FOLDER.fullmatch(name)
        folders.setdefault(name if match is None else _WORDS[match[1].lower()], []).append(name)
    to_train_and_test = TRAIN in folders and bool(set(folders) & set(HELD_OUT))
    nothing_else = set(folders) <= {TRAIN, *HELD_OUT} and (TRAIN in folders or len(folders) > 1)
    if not (to_train_and_test or nothing_else):
        return {}
    return {split: folders[split] for split in _in_order(set(folders))}


def choose_split(
    names: Sequence[str], configured: str | None, *, held_out: bool, where: str, key: str
) -> str | None:
    """Return the split to read; None if there are none.

    Args:
        names: Names of the existing splits.
        configured: Name of the configured split, or None.
        held_out: Whether to prefer validation and test images over training images.
        where: Name of the source for the error message.
        key: The setting that names a split, for the error message.

    Raises:
        DataError: If the configured split does not exist, or the choice is ambiguous.
    """
    existing_text = ", ".join(names) or "none"
    if configured is not None:
        wanted = configured if configured in names else canonical(configured) or configured
        if wanted in names:
            return wanted
        raise DataError(
            f"{where}: split={configured}: no such split; existing splits: {existing_text}"
        )
    preferred = (*HELD_OUT, TRAIN) if held_out else (TRAIN,)
    if existing := [name for name in preferred if name in names]:
        return existing[0]
    if len(names) > 1:
        raise DataError(
            f"{where}: holds the splits {existing_text} and none for training; set {key}"
        )
    return names[0] if names else None


def describe_choice(chosen: str, counts: Mapping[str, int], what: str, *, key: str) -> str:
    """Return a note that names the split in use and the other splits.

    Args:
        chosen: Name of the split in use.
        counts: Number of files in each split.
        what: The counted unit, such as "image".
        key: The setting that names a split.
    """
    others = [f"{name} ({count:,})" for name, count in counts.items() if name != chosen]
    line = f"the split {chosen} is read ({counted(counts[chosen], what)})"
    if not others:
        return line
    return f"{line}; {key}=NAME reads another one: {', '.join(others)}"
