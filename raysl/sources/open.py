"""Open the source that a configuration names."""

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError, counted
from raysl.sources.contents import Contents, list_by_kind, names_of, paths_below, sort_by_kind
from raysl.sources.folder import FolderSource
from raysl.sources.footers import check_manifest, may_have_images
from raysl.sources.formats import IMAGE_SUFFIXES, TAR_SUFFIXES
from raysl.sources.image_folders import open_images
from raysl.sources.img2dataset import download_notes
from raysl.sources.manifest import is_half_packed, read_manifest
from raysl.sources.mixed import MixedSource
from raysl.sources.parquet import ParquetSource
from raysl.sources.source import (
    BUILT_IN,
    ArraySource,
    DataConfig,
    Source,
    SourceConfig,
    refuse_columns,
    spread_rows,
)
from raysl.sources.splits import TRAIN, choose_split, describe_choice, split_shards
from raysl.sources.storage import (
    existing_part,
    file_table,
    is_local,
    match_glob,
    resolve,
    unreachable,
)
from raysl.sources.subset import UnlabelledSource
from raysl.sources.tables import (
    TableKind,
    check_no_tables_below,
    current_files,
    table_kind,
    table_note,
)
from raysl.sources.tar import TarSource, expand_braces
from raysl.sources.tar_members import compressed


def open_source(
    config: SourceConfig, *, split: str | None = None, held_out: bool = False, data: DataConfig
) -> Source:
    """Open the images that ``config.source`` names.

    Args:
        config: The source's settings. For a ``DataConfig``, the training split includes
            ``data.mix``, and ``data.labels: none`` removes the labels.
        split: The split to open; None takes ``config.split``.
        held_out: Which split to open if none is named: with True, the first of validation, test and
            training that exists; with False, the training split.
        data: Settings with the folder of torchvision's sets and the memory for shuffling.

    Raises:
        DataError: If the source does not exist or has no usable images.
    """
    source = _open_mixed(config, split, held_out, data)
    unlabelled = isinstance(config, DataConfig) and config.labels == "none"
    return UnlabelledSource(source) if unlabelled else source


def _open_mixed(
    config: SourceConfig, split: str | None, held_out: bool, data: DataConfig
) -> Source:
    first = _Opener(config, split, held_out, data).open()
    if held_out or split not in (None, TRAIN):
        return first
    if not isinstance(config, DataConfig) or not config.mix:
        return first
    parts, weights = [first], [1.0]
    for number, part in enumerate(config.mix):
        named = part.called(f"data.mix[{number}]")
        try:
            parts.append(_Opener(named, None, held_out, data).open())
        except DataError as error:
            if str(error).startswith(named.named):
                raise
            raise DataError(f"{named.named}: {error}") from None
        weights.append(part.weight)
    return MixedSource(parts, weights)


class _Opener:
    """Opens one source; holds the arguments of :func:`open_source`."""

    def __init__(
        self, config: SourceConfig, split: str | None, held_out: bool, data: DataConfig
    ) -> None:
        self.config, self.data, self.split, self.held_out = config, data, split, held_out
        self.where = config.named

    def open(self) -> Source:
        """Open the source that the configuration names."""
        if self.config.source in BUILT_IN:
            return self._built_in()
        self.filesystem, path = resolve(self.config.source, setting=self.config.key("source"))
        try:
            kind = self.filesystem.get_file_info(path).type
            if kind == pafs.FileType.Directory:
                return self._folder(path.rstrip("/") or "/")
            return self._listed(path, is_file=kind == pafs.FileType.File)
        except (OSError, pa.ArrowException) as error:
            setting = self.config.key("source")
            raise unreachable(self.config.source, error, setting=setting) from None

    def _built_in(self) -> ArraySource:
        config = self.config
        refuse_columns(config, "a built-in set")
        if config.filter:
            raise DataError(
                f"{self.where}: {config.key('filter')} does not apply to a built-in set, which has "
                f"no columns"
            )
        # Imported here, because data workers import this module and must not load scikit-learn.
        from raysl.sources.builtin import (  # noqa: PLC0415
            SPLITS,
            open_digits,
            open_torchvision,
        )

        split = self._choose(SPLITS) or TRAIN
        source: ArraySource = (
            open_digits(split)
            if config.source == "digits"
            else open_torchvision(config, split, root=self.data.torchvision_root)
        )
        return source if config.limit is None else _with_limit(source, config.limit)

    def _choose(self, names: Sequence[str]) -> str | None:
        """Return which of the existing splits to read; None if there are none."""
        name = self.config.split
        if names and self.split is not None:  # the caller's choice replaces the setting
            name = self.split
        key = self.config.key("split")
        return choose_split(names, name, held_out=self.held_out, where=self.where, key=key)

    def _listed(self, path: str, *, is_file: bool) -> Source:
        """Open a file, or the files that a glob or a range matches."""
        root, files = self._matching(path, is_file=is_file)
        contents = sort_by_kind(files)
        if contents.compressed.num_rows:
            first = paths_below(contents.compressed, root)[0]
            raise DataError(f"{self.where}: {compressed(first, 'by its name')}")
        kinds = [
            table for table in (contents.images, contents.parquet, contents.tars) if table.num_rows
        ]
        if not kinds or (is_file and contents.images.num_rows):
            raise DataError(
                f"{self.where}: {path} is not named like a Parquet file or a tar shard; "
                f"for images, give their folder"
            )
        if len(kinds) > 1:
            raise DataError(
                f"{self.where}: matches {contents.images.num_rows:,} images and both "
                f"{contents.parquet.num_rows:,} .parquet and {contents.tars.num_rows:,} .tar "
                f"files; give a pattern that matches one kind"
            )
        if contents.images.num_rows:
            self._choose(())
            return FolderSource(self.config, self.filesystem, files, root, notes=contents.notes)
        note = ""
        if contents.parquet.num_rows:
            note = table_note(self.filesystem, root, setting=self.config.key("source"))
        return self._shards(kinds[0], root, [*contents.notes, *filter(None, [note])], by_name=True)

    def _matching(self, path: str, *, is_file: bool) -> tuple[str, pa.Table]:
        if is_file:
            root, _, name = path.rpartition("/")
            return root, file_table([name])
        root, rest = existing_part(self.filesystem, path)
        if re.search(r"\{.*\}", rest):
            return root, file_table(expand_braces(rest, setting=self.config.key("source")))
        root, files = match_glob(self.filesystem, path)
        if files.num_rows == 0:
            raise DataError(
                f"{self.where}: {_nothing_there(self.filesystem, path)} ({path}); give "
                f"{', '.join(BUILT_IN)}, a folder of images, or shards (Parquet or .tar: a file, a "
                f"folder, a glob, a range such as DIR/{{000..099}}.tar)"
            )
        return root, files

    def _folder(self, root: str) -> Source:
        """Open the Parquet files below a folder, or else its tar shards, or else its images."""
        if table := table_kind(self.filesystem, root):
            return self._table(root, table)
        if is_half_packed(self.filesystem, root):
            raise DataError(
                f"{self.where}: `raysl pack` has not finished in this folder; run the same pack "
                f"again to resume it"
            )
        contents = list_by_kind(self.filesystem, root)
        images, parquet, tars = (
            contents.images.num_rows,
            contents.parquet.num_rows,
            contents.tars.num_rows,
        )
        notes = list(contents.notes)
        if parquet and not self._are_metadata(contents, root):
            check_no_tables_below(
                self.filesystem,
                root,
                names_of(contents.parquet),
                setting=self.config.key("source"),
            )
            return self._parquet(contents, root)
        if parquet:
            notes += download_notes(self.filesystem, paths_below(contents.parquet, root))
        if tars and images:
            raise DataError(
                f"{self.where}: holds {images:,} images and {tars:,} .tar files; give "
                f"{root}/*.tar for the shards, or move them away from the images"
            )
        if tars:
            return self._shards(contents.tars, root, notes)
        if images:
            choose = self._choose
            return open_images(
                self.config, self.filesystem, contents.images, root, choose=choose, notes=notes
            )
        raise DataError(f"{self.where}: {_no_images(contents, root)}")

    def _table(self, root: str, kind: TableKind) -> Source:
        self._choose(())
        return ParquetSource(
            self.config,
            self.filesystem,
            current_files(self.filesystem, root, kind, self.config),
            window_mib=self.data.shuffle_window_mib,
            root=root,
        )

    def _are_metadata(self, contents: Contents, root: str) -> bool:
        """Return whether the Parquet files only describe the tar shards or images beside them."""
        if not (contents.tars.num_rows or contents.images.num_rows):
            return False
        first = paths_below(contents.parquet, root)[0]
        return not may_have_images(self.filesystem, first, self.config)

    def _parquet(self, contents: Contents, root: str) -> Source:
        manifest = read_manifest(self.filesystem, root)
        if manifest is not None and self.config.image_column in (None, manifest.image_column):
            check_manifest(manifest, contents.parquet, root)
            self._choose(())
            return ParquetSource(
                self.config,
                self.filesystem,
                paths_below(contents.parquet, root),
                window_mib=self.data.shuffle_window_mib,
                manifest=manifest,
                root=root,
            )
        notes = list(contents.notes)
        for table, noun in ((contents.images, "image"), (contents.tars, ".tar file")):
            if table.num_rows:
                notes.append(f"{counted(table.num_rows, noun)} beside the Parquet files left out")
        return self._shards(contents.parquet, root, notes)

    def _shards(
        self, shards: pa.Table, root: str, notes: Sequence[str], *, by_name: bool = False
    ) -> Source:
        """Open the Parquet or tar shards of one split, or all shards if ``by_name``."""
        names = names_of(shards)
        parts = split_shards(names)
        counts = {name: parts.split_of.count(name) for name in parts.names}
        lines = list(notes)
        chosen = self._choose(() if by_name else parts.names)
        if chosen is not None:
            lines.append(describe_choice(chosen, counts, "file", key=self.config.key("split")))
            names = [
                name for name, split in zip(names, parts.split_of, strict=True) if split == chosen
            ]
            if outside := parts.split_of.count(None):
                lines.append(f"{counted(outside, 'file')} in no split left out")
        elif len(counts) > 1:
            several = ", ".join(f"{name} ({count:,})" for name, count in counts.items())
            lines.append(f"the named files belong to several splits, read as one: {several}")
        kind = TarSource if names[0].lower().endswith(TAR_SUFFIXES) else ParquetSource
        return kind(
            self.config,
            self.filesystem,
            [f"{root.rstrip('/')}/{name}" for name in names],
            window_mib=self.data.shuffle_window_mib,
            root=root,
            splits=parts.names if chosen is not None else (),
            notes=lines,
        )


def _no_images(contents: Contents, root: str) -> str:
    if contents.compressed.num_rows:
        return compressed(paths_below(contents.compressed, root)[0], "by its name")
    return (
        "no images, no .parquet files and no .tar shards below that folder"
        + "".join(f"; {note}" for note in contents.notes)
        + f"; images end in {', '.join(IMAGE_SUFFIXES)}"
    )


def _nothing_there(filesystem: pafs.FileSystem, path: str) -> str:
    bucket = path.partition("/")[0]
    if not bucket or is_local(filesystem):
        return "no such file or folder"
    if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
        return f"no such bucket, or no permission to list it: {bucket!r}"
    return "no such object or folder"


def _with_limit(source: ArraySource, limit: int) -> ArraySource:
    labels, rows = source.labels(), spread_rows(len(source.images), limit)
    return ArraySource(
        source.name,
        source.images[rows],
        None if labels is None else labels[rows],
        source.class_names,
        source.splits,
    )
