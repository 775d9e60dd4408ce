"""Open a source by what a configuration says."""

import importlib
import re

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.sources.folder import FolderSource
from raysl.sources.footers import check_manifest
from raysl.sources.manifest import is_half_packed, read_manifest
from raysl.sources.mixed import MixedSource
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import (
    BUILT_IN,
    IMAGE_SUFFIXES,
    ArraySource,
    DataConfig,
    Source,
    SourceConfig,
    spread_rows,
)
from raysl.sources.storage import (
    HIDDEN,
    is_local,
    list_files,
    list_glob,
    readable,
    resolve,
    unreachable,
)
from raysl.sources.tables import check_no_tables_below, current_files, table_kind
from raysl.sources.tar import TarSource, expand_braces
from raysl.sources.tar_index import compressed

TRAIN = "train"
_SHARDS = (".parquet", ".tar")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


# Keys of the data section in an error message, not in a path.
_KEY = re.compile(r"(?<![\w/.-])data(?=\.(source|image_column|label_column|filter|limit)\b)")


def open_source(config: SourceConfig, *, split: str | None = None, data: DataConfig) -> Source:
    """Open the images that ``config.source`` names.

    Args:
        config: What to open; of a ``DataConfig``, the training split has ``data.mix`` mixed in.
        split: Which part of a source that has several; None takes ``config.split``, else train.
        data: Where torchvision's sets lie and how much to hold for shuffling.

    Raises:
        DataError: If there is nothing, or nothing usable, under that name.
    """
    split = split or config.split or TRAIN
    first = _open_one(config, split, data)
    if split != TRAIN or not isinstance(config, DataConfig) or not config.mix:
        return first
    parts, weights = [first], [1.0]
    for number, part in enumerate(config.mix):
        try:
            parts.append(_open_one(part, split, data))
        except DataError as error:
            text = _KEY.sub(f"data.mix[{number}]", str(error))
            asked = f"data.mix[{number}].source={part.source}"
            raise DataError(text if text.startswith(asked) else f"{asked}: {text}") from None
        weights.append(part.weight)
    return MixedSource(parts, weights)


def _open_one(config: SourceConfig, split: str, data: DataConfig) -> Source:
    if config.source in BUILT_IN:
        return _open_built_in(config, split, data)
    filesystem, path = resolve(config.source)
    try:
        return _open_files(config, filesystem, path, data.shuffle_window_mib)
    except (OSError, pa.ArrowException) as error:
        raise unreachable(config.source, error) from None


def _open_built_in(config: SourceConfig, split: str, data: DataConfig) -> ArraySource:
    if config.filter:
        raise DataError(f"data.source={config.source}: has nothing that data.filter could look at")
    # By name: data workers import this room, and must load neither torch nor scikit-learn.
    builtin = importlib.import_module("raysl.sources.builtin")
    source: ArraySource = (
        builtin.open_digits(split)
        if config.source == "digits"
        else builtin.open_torchvision(config.source, split, root=data.torchvision_root)
    )
    return source if config.limit is None else _some(source, config.limit)


def _open_files(
    config: SourceConfig, filesystem: pafs.FileSystem, path: str, window_mib: int
) -> Source:
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        return _open_folder(config, filesystem, path, window_mib)
    if kind == pafs.FileType.File:
        files = [path]
    elif re.search(r"\{.*\}", path):
        files = expand_braces(path)
    else:
        files = list_glob(filesystem, path)
    if not files:
        raise DataError(
            f"data.source={config.source}: {_nothing_there(filesystem, path)} ({path}); give "
            f"{', '.join(BUILT_IN)}, a folder of images, or shards (Parquet or .tar: a file, a "
            f"folder, a glob, a range such as DIR/{{000..099}}.tar)"
        )
    if squeezed := [file for file in files if file.lower().endswith(_COMPRESSED)]:
        raise DataError(f"data.source={config.source}: {compressed(squeezed[0], 'by its name')}")
    suffixes = {suffix for file in files for suffix in _SHARDS if file.lower().endswith(suffix)}
    if kind == pafs.FileType.File and not suffixes:
        raise DataError(
            f"data.source={config.source}: not a Parquet file and not a tar shard ({path}), by its "
            f"name; a single image is no source: give its folder"
        )
    if suffixes == set(_SHARDS):
        raise DataError(f"data.source={config.source}: matches both .parquet and .tar files")
    if suffixes == {".tar"}:
        return TarSource(config, filesystem, files, window_mib=window_mib)
    return ParquetSource(config, filesystem, files, window_mib=window_mib)


def _nothing_there(filesystem: pafs.FileSystem, path: str) -> str:
    bucket = path.partition("/")[0]
    if not bucket or is_local(filesystem):
        return "no such file or folder"
    if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
        return f"no such bucket, or no right to see it: {bucket!r}"
    return "no such object or folder"


def _open_folder(
    config: SourceConfig, filesystem: pafs.FileSystem, root: str, window_mib: int
) -> Source:
    """Open the Parquet files below a folder, or else its tar shards, or else its images."""
    root = root.rstrip("/") or "/"
    if table := table_kind(filesystem, root):
        files = current_files(filesystem, root, table, config.source)
        return ParquetSource(config, filesystem, files, window_mib=window_mib, root=root)
    found = list_files(filesystem, root, (*IMAGE_SUFFIXES, *_SHARDS, *_COMPRESSED))
    parquet, tars, squeezed = (
        _ending(found, suffixes) for suffixes in ((".parquet",), (".tar",), _COMPRESSED)
    )
    images = _ending(found, IMAGE_SUFFIXES)
    parquet, tars = _not_hidden(parquet), _not_hidden(tars)
    if is_half_packed(filesystem, root):
        raise DataError(
            f"data.source={config.source}: `raysl pack` has not finished there; the same pack "
            f"again goes on where it stopped"
        )
    if parquet.num_rows:
        check_no_tables_below(filesystem, root, map(readable, parquet.column("path").to_pylist()))
        manifest = read_manifest(filesystem, root)
        if manifest is not None and config.image_column in (None, manifest.image_column):
            check_manifest(manifest, parquet, root)
        else:
            manifest = None
        return ParquetSource(
            config,
            filesystem,
            _paths(parquet, root),
            window_mib=window_mib,
            manifest=manifest,
            root=root,
        )
    if tars.num_rows and images.num_rows:
        raise DataError(
            f"data.source={config.source}: holds {images.num_rows:,} images and {tars.num_rows:,} "
            f".tar files; give {root}/*.tar for the shards, or move them away from the images"
        )
    if tars.num_rows:
        return TarSource(config, filesystem, _paths(tars, root), window_mib=window_mib)
    if images.num_rows:
        return FolderSource(config, filesystem, images, root)
    if squeezed.num_rows:
        raise DataError(
            f"data.source={config.source}: {compressed(_paths(squeezed, root)[0], 'by its name')}"
        )
    raise DataError(
        f"data.source={config.source}: no images, no .parquet files and no .tar shards below that "
        f"folder; images end in {', '.join(IMAGE_SUFFIXES)}"
    )


def _ending(files: pa.Table, suffixes: tuple[str, ...]) -> pa.Table:
    endings = "|".join(re.escape(suffix) for suffix in suffixes)
    return files.filter(pc.match_substring_regex(files.column("path"), rf"(?i)({endings})$"))


def _not_hidden(files: pa.Table) -> pa.Table:
    hidden = pc.match_substring_regex(files.column("path"), rf"(^|/)[{re.escape(HIDDEN)}]")
    return files.filter(pc.invert(hidden))


def _paths(files: pa.Table, root: str) -> list[str]:
    root = root.rstrip("/")
    return [f"{root}/{readable(path)}" for path in files.column("path").to_pylist()]


def _some(source: ArraySource, limit: int) -> ArraySource:
    labels, rows = source.labels(), spread_rows(len(source.images), limit)
    return ArraySource(
        source.name,
        source.images[rows],
        None if labels is None else labels[rows],
        source.class_names,
        source.splits,
    )
