"""Open table formats (Delta Lake, Iceberg, Hudi): read from their log which files are current.

These formats rewrite rows and leave the old files in place, so a listing of the files mixes
overwritten or deleted rows with their replacements.
"""

import importlib
import os
import re
from collections.abc import Iterable
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.sources.source import SourceConfig
from raysl.sources.storage import is_local, read_file

TableKind = Literal["delta", "iceberg", "hudi"]

_NAMES = {"delta": "Delta", "iceberg": "Iceberg", "hudi": "Hudi"}
_PACKAGES = {"delta": "deltalake", "iceberg": "pyiceberg"}
_MARKS = {"_delta_log": "delta", "metadata": "iceberg", ".hoodie": "hudi"}
_ICEBERG_VERSION = re.compile(r"v?(\d+)(-[^/]*)?(\.gz)?\.metadata\.json(\.gz)?")
_MAX_FOLDERS = 64  # each is checked; folders of tables side by side are few
_REWRITE = {
    "delta": "run OPTIMIZE or REORG TABLE ... APPLY (PURGE), which rewrites its files",
    "iceberg": "run rewrite_data_files, which rewrites its files",
}


def table_kind(filesystem: pafs.FileSystem, root: str) -> TableKind | None:
    """Return a folder's table format, recognised by ``_delta_log`` or ``metadata/*.metadata.json``.

    Returns None for another folder. ``hudi`` is recognised but not supported.
    """
    root = root.rstrip("/")
    infos = filesystem.get_file_info([f"{root}/{mark}" for mark in _MARKS])
    for info, kind in zip(infos, _MARKS.values(), strict=True):
        if info.type != pafs.FileType.Directory:
            continue
        if kind != "iceberg" or _iceberg_versions(filesystem, root):
            return kind  # type: ignore[return-value]
    return None


def check_no_tables_below(
    filesystem: pafs.FileSystem, root: str, files: Iterable[str], *, setting: str
) -> None:
    """Raise DataError if a folder contains a table, among other tables or files.

    Args:
        filesystem: The file system of the folder.
        root: Path of the folder, which is not a table itself.
        files: Paths of the folder's Parquet files, relative to it.
        setting: The setting that names the folder, for messages.

    Raises:
        DataError: If a folder in the first two levels is a table.
    """
    folders: dict[str, None] = {}
    for file in files:
        parts = file.split("/")[:-1]
        folders |= {"/".join(parts[: depth + 1]): None for depth in range(min(2, len(parts)))}
        if len(folders) > _MAX_FOLDERS:
            break
    for folder in list(folders)[:_MAX_FOLDERS]:
        if kind := table_kind(filesystem, f"{root.rstrip('/')}/{folder}"):
            raise DataError(
                f"{setting}={root}: {folder} in it is a {_NAMES[kind]} table, whose files "
                f"also hold removed rows. Give the table itself "
                f"({setting}={root.rstrip('/')}/{folder}), and others with data.mix"
            )


def table_note(filesystem: pafs.FileSystem, folder: str, *, setting: str) -> str:
    """Return a note if files belong to a table and may be outdated; "" if they do not."""
    for root in (folder, folder.rpartition("/")[0]):
        if root and (kind := table_kind(filesystem, root)):
            return (
                f"the files belong to a {_NAMES[kind]} table ({root}) and may also hold removed "
                f"rows; {setting}={root} reads only current rows"
            )
    return ""


def current_files(
    filesystem: pafs.FileSystem, root: str, kind: TableKind, config: SourceConfig
) -> list[str]:
    """Return the paths of a table's current files, sorted.

    ``deltalake`` or ``pyiceberg`` reads the log. For Iceberg, it reads the newest metadata file;
    catalogs are not read.

    Args:
        filesystem: The file system of the table.
        root: Path of the table's folder.
        kind: The result of ``table_kind``.
        config: The source as configured, for messages and the settings of the store.

    Raises:
        DataError: If the library is not installed or cannot read the table, the store is not
            supported, only some rows of a file are removed, or files are outside of the folder.
    """
    uri = config.source
    what = f"{config.named}: is a {_NAMES[kind]} table, whose files also hold removed rows"
    if kind == "hudi":
        raise DataError(f"{what}. {_export('its current rows')}")
    if not is_local(filesystem) and (not uri.startswith("s3://") or "?" in uri):
        raise DataError(
            f"{what}. Such tables are read from local disks and from s3://BUCKET/PATH without "
            f"settings after a question mark. {_export('its current rows')}"
        )
    try:
        importlib.import_module(_PACKAGES[kind])
    except ImportError:
        raise DataError(
            f"{what}. To read the current ones: pip install 'raysl[tables]' "
            f"({_PACKAGES[kind]} reads its log). Or: {_export('them')}"
        ) from None
    location = root if is_local(filesystem) else f"s3://{root}"
    find = _delta_files if kind == "delta" else _iceberg_files
    try:
        files = find(filesystem, location, what)
    except DataError:
        raise
    except Exception as error:  # the libraries raise many types without a common base
        raise DataError(f"{what}; {_PACKAGES[kind]} cannot read its log: {error}") from None
    below = _below(files, root, what)
    if not below:
        raise DataError(f"{config.named}: the {_NAMES[kind]} table holds no rows")
    return below


def _export(rows: str) -> str:
    return f"Write {rows} to Parquet files in another folder with the engine that wrote the table"


def _delta_files(filesystem: pafs.FileSystem, location: str, what: str) -> list[str]:
    library: Any = importlib.import_module("deltalake")
    endpoint = _endpoint()
    settings = {"AWS_ENDPOINT_URL": endpoint} if endpoint else {}
    if endpoint.startswith("http://"):
        settings["AWS_ALLOW_HTTP"] = "true"
    table = library.DeltaTable(location, storage_options=None if is_local(filesystem) else settings)
    if "deletionVectors" in (table.protocol().reader_features or []):
        removed = next(
            (b for b in pa.RecordBatchReader.from_stream(table.deletion_vectors()) if len(b)), None
        )
        if removed is not None:
            raise DataError(
                _in_part(what, "delta", "deletion vectors", removed.column(0)[0].as_py())
            )
    renamed = {
        field.name: physical
        for field in table.schema().fields
        if (physical := field.metadata.get("delta.columnMapping.physicalName", field.name))
        != field.name
    }
    if renamed:
        logical, physical = next(iter(renamed.items()))
        raise DataError(
            f"{what}. Its columns have other names in the files (column mapping: {logical!r} is "
            f"{physical!r} there). {_export('its current rows')}"
        )
    # file_uris() encodes the names of the folder, but not those of the files.
    paths = pa.table(table.get_add_actions()).column("path").to_pylist()
    return [path if ":/" in path else f"{location}/{unquote(path)}" for path in paths]


def _iceberg_files(filesystem: pafs.FileSystem, location: str, what: str) -> list[str]:
    library: Any = importlib.import_module("pyiceberg.table")
    root = location.removeprefix("s3://")
    metadata = _newest_metadata(filesystem, root, what)
    settings = {"s3.endpoint": _endpoint()} if _endpoint() else {}
    prefix = "" if is_local(filesystem) else "s3://"
    table = library.StaticTable.from_metadata(f"{prefix}{metadata}", properties=settings)
    files = []
    for task in table.scan().plan_files():
        if task.delete_files:
            raise DataError(_in_part(what, "iceberg", "delete files", task.file.file_path))
        if task.file.file_format.name != "PARQUET":
            raise DataError(
                f"{what}. It holds {task.file.file_format.name} files, not only Parquet"
            )
        files.append(str(task.file.file_path))
    return files


def _in_part(what: str, kind: str, how: str, file: str) -> str:
    return (
        f"{what}. In some files, only some of the rows are removed ({how}: {file}); reading the "
        f"files would restore them. To read the table: {_REWRITE[kind]}"
    )


def _iceberg_versions(filesystem: pafs.FileSystem, root: str) -> dict[str, int]:
    """Return the versions of a table's metadata files, by name."""
    selector = pafs.FileSelector(f"{root.rstrip('/')}/metadata")
    names = [info.base_name for info in filesystem.get_file_info(selector)]
    matches = {name: _ICEBERG_VERSION.fullmatch(name) for name in names}
    return {name: int(match[1]) for name, match in matches.items() if match}


def _newest_metadata(filesystem: pafs.FileSystem, root: str, what: str) -> str:
    versions = _iceberg_versions(filesystem, root)
    folder = f"{root.rstrip('/')}/metadata"
    hint = f"{folder}/version-hint.text"  # written by tables without a catalog
    newest = max(versions.values())
    if filesystem.get_file_info(hint).type == pafs.FileType.File:
        text = read_file(filesystem, hint).decode(errors="replace").strip()
        newest = int(text) if text.isdigit() else newest
    names = [name for name, version in versions.items() if version == newest]
    if len(names) != 1:
        raise DataError(
            f"{what}. Only its catalog knows which state is the current one: "
            f"{', '.join(sorted(names)) or f'none of version {newest}'} in {folder}"
        )
    return f"{folder}/{names[0]}"


def _below(files: Iterable[str], root: str, what: str) -> list[str]:
    """Return paths in the source's file system, all below the table's folder."""
    paths = []
    top = root.rstrip("/") + "/"
    for file in files:  # Iceberg never percent-encodes paths, so none is decoded
        path = re.sub("^file:/+", "/", file)
        path = re.sub("^s3[an]?://", "", path)
        if not path.startswith(top):
            raise DataError(
                f"{what}. Its log names files in another folder ({file}): the table was copied or "
                f"moved. Give it in its original place, or: {_export('its current rows')}"
            )
        paths.append(path)
    return sorted(paths)


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
