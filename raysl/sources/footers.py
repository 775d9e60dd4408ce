"""What Parquet footers, or the manifest of a packed folder, say of the images in the files."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raysl.errors import DataError
from raysl.sources.filter import columns_of, describe_filter, keep
from raysl.sources.manifest import MANIFEST_NAME, Manifest
from raysl.sources.source import SourceConfig, digest
from raysl.sources.storage import num_readers, patiently

Ints = npt.NDArray[np.int64]

_FILES_AT_ONCE = 256  # a limit or an error ends the reading within so many


class Footer(NamedTuple):
    """One Parquet file."""

    path: str
    image_column: str
    """As Parquet names its values: ``image``, or ``image.bytes`` of a struct."""
    label_column: str | None
    rows: Ints
    """Of each row group."""
    bytes: Ints
    """Images of each row group."""
    identity: str
    """Changes with the file; empty where a manifest's fingerprint stands for all."""
    kept: Ints | None = None
    """Rows of the file that the filter keeps; None without a filter."""


class Groups(NamedTuple):
    """The row groups that hold kept rows, in order. One number each, so that a million are small.

    ``file``, ``number`` (in the file) and ``rows`` (that are kept) are ``(num_groups,)``.
    """

    file: npt.NDArray[np.int32]
    number: npt.NDArray[np.int32]
    rows: Ints
    places: npt.NDArray[np.int32] | None
    """Place in its row group of each kept row, ``(num_images,)``; None if the first ones are."""
    num_bytes: int
    """Images of these row groups."""


def open_parquet(
    filesystem: pafs.FileSystem, path: str, footer: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        DataError: If it cannot be read or is not Parquet.
    """
    try:
        return patiently(
            filesystem,
            lambda: pq.ParquetFile(path, filesystem=filesystem, metadata=footer, pre_buffer=True),
        )
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from None


def read_footers(
    filesystem: pafs.FileSystem, files: Sequence[str], config: SourceConfig
) -> Iterator[Footer]:
    """Read footers, and the columns of the filter, several files at a time; yield them in order.

    Raises:
        DataError: If a file is not Parquet, its columns do not fit, or differ from the first's.
    """

    def read(path: str) -> Footer:
        parquet = open_parquet(filesystem, path)
        schema, metadata = parquet.schema_arrow, parquet.metadata
        image = _image_column(schema, config, path)
        rows, sizes = _row_groups(metadata, image)
        name = path.rsplit("/", 1)[-1]
        identity = f"{name}:{metadata.num_rows}:{metadata.serialized_size}:{sizes.tolist()}\n"
        footer = Footer(path, image, _label_column(schema, config, path), rows, sizes, identity)
        return footer._replace(kept=_kept(parquet, config, path)) if config.filter else footer

    return _in_order(filesystem, files, read)


def manifest_footers(
    filesystem: pafs.FileSystem, root: str, manifest: Manifest, config: SourceConfig
) -> Iterator[Footer]:
    """Return what a manifest says of its files, without opening them unless there is a filter."""
    known = {f"{root.rstrip('/')}/{file.path}": file for file in manifest.files}

    def read(path: str) -> Footer:
        file = known[path]
        kept = None
        if config.filter:
            kept = _kept(open_parquet(filesystem, path), config, path)
        label = config.label_column or manifest.label_column
        rows, sizes = np.array(file.rows, np.int64), np.array(file.bytes, np.int64)
        return Footer(path, manifest.image_column, label, rows, sizes, "", kept)

    return _in_order(filesystem, list(known), read) if config.filter else map(read, known)


def check_manifest(manifest: Manifest, files: pa.Table, root: str) -> None:
    """Compare a manifest with a listing of its folder.

    Args:
        manifest: What the folder should hold.
        files: ``path`` (relative to the folder) and ``bytes`` of its Parquet files.
        root: The folder.

    Raises:
        DataError: If a file is missing, of another size, or not in the manifest.
    """
    paths = [path.decode(errors="replace") for path in files.column("path").to_pylist()]
    there = dict(zip(paths, files.column("bytes").to_pylist(), strict=True))
    advice = (
        f"Run raysl pack again, or remove {MANIFEST_NAME} to read what is there by the files' "
        f"own footers"
    )
    for file in manifest.files:
        size = there.pop(file.path, None)
        if size is None:
            raise DataError(f"{root}/{file.path}: is missing; {MANIFEST_NAME} lists it. {advice}")
        if size != file.size_bytes:
            raise DataError(
                f"{root}/{file.path}: has {size:,} bytes, but {file.size_bytes:,} in "
                f"{MANIFEST_NAME}. {advice}"
            )
    if there:
        raise DataError(f"{root}/{next(iter(there))}: is not in {MANIFEST_NAME}. {advice}")


def gather(footers: Iterator[Footer], limit: int | None) -> tuple[list[Footer], Groups, str]:
    """Cut files into row groups of kept rows, up to a limit of rows.

    Returns:
        The files that were looked at, the groups, and a fingerprint of both.

    Raises:
        DataError: If the files' columns differ.
    """
    looked: list[Footer] = []
    numbers, rows, places, sizes = [], [], [], []
    left = np.iinfo(np.int64).max if limit is None else limit
    for footer in footers:
        _check_alike(footer, looked[0] if looked else footer)
        looked.append(footer._replace(rows=np.empty(0, np.int64), kept=None))
        ends = np.cumsum(footer.rows)
        starts = ends - footer.rows
        if footer.kept is None:
            kept_rows = np.clip(left - starts, 0, footer.rows)
        else:
            kept = footer.kept[:left]
            of = np.searchsorted(ends, kept, side="right")
            kept_rows = np.bincount(of, minlength=len(ends)).astype(np.int64)
            places.append((kept - starts[of]).astype(np.int32))
        number = np.flatnonzero(kept_rows).astype(np.int32)
        numbers.append(number)
        rows.append(kept_rows[number])
        sizes.append(int(footer.bytes[number].sum()))
        left -= int(kept_rows.sum())
        if left == 0:
            break
    groups = Groups(
        np.repeat(np.arange(len(numbers), dtype=np.int32), [len(n) for n in numbers]),
        np.concatenate([np.empty(0, np.int32), *numbers]),
        np.concatenate([np.empty(0, np.int64), *rows]),
        np.concatenate(places) if places else None,
        sum(sizes),
    )
    chosen = b"" if groups.places is None else groups.places.tobytes() + groups.rows.tobytes()
    return looked, groups, digest(*(footer.identity for footer in looked), chosen)


def describe_choice(config: SourceConfig) -> str:
    """Return a text that changes with the filter and the limit; empty without them."""
    if not config.filter and config.limit is None:
        return ""
    return json.dumps([describe_filter(config.filter), config.limit])


def _in_order(
    filesystem: pafs.FileSystem, files: Sequence[str], read: Callable[[str], Footer]
) -> Iterator[Footer]:
    if len(files) == 1:
        yield read(files[0])
        return
    waiting = iter(files)
    with ThreadPoolExecutor(num_readers(filesystem)) as pool:
        while some := list(islice(waiting, _FILES_AT_ONCE)):
            yield from pool.map(read, some)


def _check_alike(footer: Footer, first: Footer) -> None:
    ours, theirs = (f[1:3] for f in (footer, first))
    if ours != theirs:
        raise DataError(
            f"{footer.path}: images in {ours[0]!r}, labels in {ours[1]!r}; unlike {first.path}: "
            f"{theirs[0]!r}, {theirs[1]!r}"
        )


def _kept(parquet: pq.ParquetFile, config: SourceConfig, path: str) -> Ints:
    columns = [c for c in columns_of(config.filter) if c in parquet.schema_arrow.names]
    try:
        table = parquet.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if len(columns) < len(columns_of(config.filter)):  # name all that could have been asked for
        table = parquet.schema_arrow.empty_table()
    return np.flatnonzero(keep(table, config.filter, where=path))


def _row_groups(metadata: pq.FileMetaData, image_column: str) -> tuple[Ints, Ints]:
    """Return the rows and the bytes of images of each row group."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    place = next(
        (i for i in range(metadata.num_columns) if metadata.schema.column(i).path == image_column),
        None,
    )
    rows = np.array([group.num_rows for group in groups], dtype=np.int64)
    sizes = [0 if place is None else g.column(place).total_uncompressed_size for g in groups]
    return rows, np.array(sizes, dtype=np.int64)


def _is_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # Hugging Face: {"bytes": binary, "path": string}
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def has_images(filesystem: pafs.FileSystem, path: str, config: SourceConfig) -> bool:
    """Return whether a Parquet file has a column of encoded images, or the one that is asked for.

    Raises:
        DataError: If it cannot be read or is not Parquet.
    """
    schema = open_parquet(filesystem, path).schema_arrow
    return config.image_column in schema.names or any(_is_images(field.type) for field in schema)


def _image_column(schema: pa.Schema, config: SourceConfig, path: str) -> str:
    candidates = [field.name for field in schema if _is_images(field.type)]
    name = config.image_column
    if name is None:
        name = "image" if "image" in candidates else candidates[0] if len(candidates) == 1 else None
    if name is None or name not in candidates:
        asked = "" if config.image_column is None else f" called {config.image_column!r}"
        raise DataError(
            f"{path}: no single column of encoded images{asked}; binary columns: "
            f"{', '.join(candidates) or 'none'}; all: {', '.join(schema.names)}. "
            f"Set data.image_column"
        )
    return f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name


def _label_column(schema: pa.Schema, config: SourceConfig, path: str) -> str | None:
    name = config.label_column or ("label" if "label" in schema.names else None)
    if name is not None and name not in schema.names:
        raise DataError(
            f"{path}: no column {name!r} for the labels; columns: {', '.join(schema.names)}. "
            f"Set data.label_column"
        )
    return name
