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
        images: ``path``, relative to the folder, and ``bytes`` of all images below it.
        root: The folder.
        choose: Selects one of the given splits.
        notes: Remarks about other content of the folder.

    Raises:
        DataError: If there is no such split, or the filter leaves no image.
    """
    layout = folder_layout(lambda folder: _folders_below(images, folder))
    chosen = choose(list(layout.splits))
    if chosen is None:
        lines = _doubts(layout, images, root)
        classes = ClassFolders(are_classes=not layout.annotations)
        return FolderSource(
            config, filesystem, images, root, classes=classes, notes=[*notes, *lines]
        )
    counts = {name: _below(images, layout, name).num_rows for name in layout.splits}
    lines = [describe_choice(chosen, counts, "image")]
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


def _doubts(layout: FolderLayout, images: pa.Table, root: str) -> list[str]:
    lines = []
    if layout.annotations:
        names = ", ".join(layout.annotations)
        lines.append(
            f"folders {names} look like annotations of the images beside them: they are read as "
            f"images like the others, and no folder is a class; data.source={root}/FOLDER reads "
            f"one alone"
        )
    elif layout.doubtful and len(_folders_below(images, "")) > 1:
        names = ", ".join(layout.doubtful)
        lines.append(
            f"folders {names} are called like splits and taken for classes, since there is none "
            f"for training and one to test beside it; data.source={root}/FOLDER reads one alone"
        )
    (*others, only) = _folders_below(images, "") or [""]
    if only and not others and len(below := _folders_below(images, f"{only}/")) > 1:
        shown = ", ".join(sorted(filter(None, below))[:_SHOWN])
        lines.append(
            f"all images lie in the folder {only}, which is one class; data.source={root}/{only} "
            f"takes the folders in it for classes ({shown}{', ...' if len(below) > _SHOWN else ''})"
        )
    return lines
