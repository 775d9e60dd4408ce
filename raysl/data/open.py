"""Open a source by what a configuration says."""

import importlib

import pyarrow.fs as pafs

from raysl.data.folder import FolderSource, list_images
from raysl.data.parquet import ParquetSource, list_parquet
from raysl.data.source import (
    BUILT_IN,
    IMAGE_SUFFIXES,
    ArraySource,
    DataConfig,
    Source,
    SourceConfig,
    Split,
    resolve,
)
from raysl.errors import DataError


def open_source(config: SourceConfig, *, split: Split = "train", data: DataConfig) -> Source:
    """Open the images that ``config.source`` names.

    Args:
        config: What to open.
        split: Which part of a built-in set; folders and Parquet have none.
        data: Where torchvision's sets lie and how much to hold for shuffling.

    Raises:
        DataError: If there is nothing, or nothing usable, under that name.
    """
    name = config.source
    if name in BUILT_IN:
        # By name: data workers import this room, and must load neither torch nor scikit-learn.
        builtin = importlib.import_module("raysl.data.builtin")
        source: ArraySource = (
            builtin.open_digits(split)
            if name == "digits"
            else builtin.open_torchvision(name, split, root=data.torchvision_root)
        )
        return source if config.limit is None else _first(source, config.limit)
    filesystem, path = resolve(name)
    files = _parquet_files(filesystem, path)
    if files:
        return ParquetSource(config, filesystem, files, window_mib=data.shuffle_window_mib)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        images = list_images(filesystem, path)
        if images:
            return FolderSource(config, filesystem, images, path)
        raise DataError(
            f"data.source={name}: no images and no .parquet files below that folder; images end in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    what = "no such file or folder" if kind == pafs.FileType.NotFound else "not a Parquet file"
    raise DataError(
        f"data.source={name}: {what} ({path}); give {', '.join(BUILT_IN)}, a folder of images, or "
        f"Parquet (a file, a folder, a glob)"
    )


def _parquet_files(filesystem: pafs.FileSystem, path: str) -> list[str]:
    is_file = filesystem.get_file_info(path).type == pafs.FileType.File
    return [] if is_file and not path.endswith(".parquet") else list_parquet(filesystem, path)


def _first(source: ArraySource, limit: int) -> ArraySource:
    labels = source.labels()
    return ArraySource(
        source.name,
        source.images[:limit],
        None if labels is None else labels[:limit],
        source.class_names,
    )
