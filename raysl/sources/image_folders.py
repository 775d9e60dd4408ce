"""Open image folders in common layouts: class folders, split folders, images beside masks."""

import re
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from raysl.errors import counted
from raysl.sources.folder import ClassFolders, FolderSource
from raysl.sources.source import SourceConfig
from raysl.sources.splits import FolderLayout, describe_choice, folder_layout
from raysl.sources.storage import readable

_SHOWN = 3


def open_images(
    config: SourceConfig,
    filesystem: pafs.FileSystem,
    images: pa.Table,
    root: str,
    *,
    choose: Callable[[Sequence[str]], str | None],
    notes: Sequence[str],
) -> FolderSource:
    """Open the images below a folder, or those of one of its splits.

    Args:
        config: The source's settings.
        filesystem: The file system of the folder.
        images: Table of ``path``, relative to the folder, and ``bytes`` of all images below it.
        root: Path of the folder.
        choose: Returns which of the existing splits to read; None if there are none.
        notes: Notes about other content of the folder.

    Raises:
        DataError: If there is no such split, or the filter leaves no image.
    """
    layout = folder_layout(lambda folder: _folders_below(images, folder))
    chosen = choose(list(layout.splits))
    if chosen is None:
        lines = _doubts(layout, images, root, setting=config.key("source"))
        classes = ClassFolders(are_classes=not layout.annotations)
        return FolderSource(
            config, filesystem, images, root, classes=classes, notes=[*notes, *lines]
        )
    counts = {name: _below(images, layout, name).num_rows for name in layout.splits}
    lines = [describe_choice(chosen, counts, "image", key=config.key("split"))]
    if outside := images.num_rows - sum(counts.values()):
        lines.append(f"{counted(outside, 'image')} in no split left out")
    above = tuple(f"{layout.above}{folder}/" for folder in layout.splits[chosen])
    return FolderSource(
        config,
        filesystem,
        _below(images, layout, chosen),
        root,
        classes=ClassFolders(above),
        splits=list(layout.splits),
        notes=[*notes, *lines],
    )


def _folders_below(images: pa.Table, folder: str) -> list[str]:
    """Return the subfolders that hold images, and "" if the folder itself does."""
    matches = pc.extract_regex(images.column("path"), f"^{re.escape(folder)}(?:(?P<name>[^/]+)/)?")
    names = pc.unique(pc.struct_field(matches.filter(pc.is_valid(matches)), "name"))
    return [readable(name or b"") for name in names.to_pylist()]


def _below(images: pa.Table, layout: FolderLayout, split: str) -> pa.Table:
    folders = "|".join(re.escape(folder) for folder in layout.splits[split])
    pattern = f"^{re.escape(layout.above)}({folders})/"
    return images.filter(pc.match_substring_regex(images.column("path"), pattern))


def _doubts(layout: FolderLayout, images: pa.Table, root: str, *, setting: str) -> list[str]:
    lines = []
    if layout.annotations:
        names = ", ".join(layout.annotations)
        lines.append(
            f"folders {names} look like annotations of the images beside them: their files are "
            f"read as images, and no folder is a class; {setting}={root}/FOLDER reads one "
            f"folder"
        )
    elif layout.doubtful and len(_folders_below(images, "")) > 1:
        names = ", ".join(layout.doubtful)
        lines.append(
            f"folders {names} are named like splits but used as classes, since there is not both a "
            f"training and a test folder; {setting}={root}/FOLDER reads one folder"
        )
    (*others, only) = _folders_below(images, "") or [""]
    if only and not others and len(below := _folders_below(images, f"{only}/")) > 1:
        shown = ", ".join(sorted(filter(None, below))[:_SHOWN])
        lines.append(
            f"all images are in the folder {only}, which is one class; {setting}={root}/{only} "
            f"uses the folders in it as classes ({shown}{', ...' if len(below) > _SHOWN else ''})"
        )
    return lines
