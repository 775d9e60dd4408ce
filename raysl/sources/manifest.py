"""Read and write the manifest of a packed folder, which replaces the footers of its shards.

``raysl pack`` writes ``manifest.json`` beside its Parquet shards. It lists each shard's size, and
the rows and image bytes of each row group.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.folder.whole import write_bytes
from raysl.sources.storage import read_file

MANIFEST_NAME = "manifest.json"
# A pack creates this file before all others in its folder.
CLAIM_NAME = "pack.json"
VERSION = 1


def is_half_packed(filesystem: pafs.FileSystem, folder: str) -> bool:
    """Return whether a pack into this folder started but did not finish."""
    claim, manifest = filesystem.get_file_info(
        [f"{folder}/{CLAIM_NAME}", f"{folder}/{MANIFEST_NAME}"]
    )
    return bool(claim.type == pafs.FileType.File and manifest.type == pafs.FileType.NotFound)


class ManifestFile(NamedTuple):
    """One Parquet file and its row groups."""

    path: str
    """Path relative to the folder, with forward slashes."""
    size_bytes: int
    rows: tuple[int, ...]
    """Number of rows in each row group."""
    bytes: tuple[int, ...]
    """Bytes of the images in each row group."""


class Manifest(NamedTuple):
    """The content of a folder of Parquet files."""

    images: int
    bytes: int
    """Total bytes of the encoded images."""
    fingerprint: str
    """16 hex digits that change with the images."""
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...]
    files: tuple[ManifestFile, ...]
    """The files, in the order of their rows."""
    packed: dict[str, Any]
    """The packed source and the settings of the pack."""


def read_manifest(filesystem: pafs.FileSystem, folder: str) -> Manifest | None:
    """Read a folder's manifest; return None if there is none.

    Raises:
        DataError: If it is damaged, or has a version that this raysl does not read.
    """
    path = f"{folder.rstrip('/')}/{MANIFEST_NAME}"
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        return None
    try:
        values = json.loads(read_file(filesystem, path))
    except ValueError as error:
        raise _damaged(path, f"not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("version"), int):
        raise _damaged(path, "no version")
    if values["version"] != VERSION:
        raise DataError(
            f"{path}: has version {values['version']}; this raysl reads version {VERSION}. "
            f"Update raysl, or remove the file to read the Parquet footers instead"
        )
    try:
        manifest = _parse(values)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    _check(manifest, path)
    return manifest


def write_manifest(filesystem: pafs.FileSystem, folder: str, manifest: Manifest) -> None:
    """Write a folder's manifest atomically.

    On a local disk, it is written under a temporary name and renamed. An object store shows an
    object only when it is complete.

    Raises:
        DataError: If the folder is not writable.
    """
    path = f"{folder.rstrip('/')}/{MANIFEST_NAME}"
    files = [file._asdict() for file in manifest.files]
    values = {"version": VERSION, **manifest._asdict(), "files": files}
    text = json.dumps(values, separators=(",", ":")).encode()
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            write_bytes(Path(path), text)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(text)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be written: {error}") from None


def _parse(values: dict[str, Any]) -> Manifest:
    files = tuple(
        ManifestFile(
            path=str(file["path"]),
            size_bytes=int(file["size_bytes"]),
            rows=tuple(map(int, file["rows"])),
            bytes=tuple(map(int, file["bytes"])),
        )
        for file in values["files"]
    )
    label = values["label_column"]
    return Manifest(
        images=int(values["images"]),
        bytes=int(values["bytes"]),
        fingerprint=str(values["fingerprint"]),
        image_column=str(values["image_column"]),
        label_column=None if label is None else str(label),
        class_names=tuple(map(str, values["class_names"])),
        files=files,
        packed=dict(values["packed"]),
    )


def _check(manifest: Manifest, path: str) -> None:
    """Raise DataError for a manifest with inconsistent rows or files outside of the folder."""
    if not re.fullmatch("[0-9a-f]{16}", manifest.fingerprint):
        raise _damaged(path, f"fingerprint {manifest.fingerprint!r} is not 16 hex digits")
    for file in manifest.files:
        parts = file.path.split("/")
        if file.path.startswith("/") or ".." in parts or "" in parts:
            raise _damaged(path, f"{file.path!r} is not a path below the folder")
        if len(file.rows) != len(file.bytes) or min((*file.rows, *file.bytes), default=0) < 0:
            raise _damaged(path, f"{file.path}: rows and bytes of the row groups do not match")
    if (rows := sum(sum(file.rows) for file in manifest.files)) != manifest.images:
        raise _damaged(path, f"{manifest.images} images, but the row groups hold {rows}")


def _damaged(path: str, why: str) -> DataError:
    return DataError(
        f"{path}: damaged ({why}); run raysl pack again, or remove the file to read the Parquet "
        f"footers instead"
    )
