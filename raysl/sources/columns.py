"""Find the image and label columns of a Parquet file by name and type."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysl.errors import DataError
from raysl.sources.labels import number_classes
from raysl.sources.source import SourceConfig

# Names of columns of file paths in data sets of Hugging Face, img2dataset and other exports.
_PATH_NAMES = ("image", "path", "file_name")
_NULL = "__HIVE_DEFAULT_PARTITION__"
_MOST_NAMED = 20


class Columns(NamedTuple):
    """The image and label columns of a file, named as Parquet names their values."""

    image: str
    """``image``, or ``image.bytes`` of a struct."""
    paths: str | None
    """Column of paths, read where an image is null; the image column itself if it holds only paths.
    None if there is none."""
    label: str | None
    """Column of labels, or None."""
    label_in_path: bool
    """Whether the label is not in the file but in a folder's name: ``label=cat/part-0.parquet``."""
    class_names: tuple[str, ...]
    """Names of the integer labels 0, 1, ..., from the schema that Hugging Face writes."""


def find_columns(
    schema: pa.Schema, config: SourceConfig, path: str, in_path: Collection[str] = ()
) -> Columns:
    """Return the columns that hold images and labels.

    Args:
        schema: The file's schema.
        config: The source's settings.
        path: The file's path, for messages.
        in_path: Names of columns whose values are in the names of the file's folders.

    Raises:
        DataError: If no column or several could hold images, or a named column is missing.
    """
    image, paths = _image_column(schema, config, path)
    names = [*schema.names, *(name for name in in_path if name not in schema.names)]
    label = _label_column(names, config, path)
    metadata = (schema.metadata or {}).get(b"huggingface", b"")
    label_in_path = label is not None and label not in schema.names
    return Columns(image, paths, label, label_in_path, _class_label_names(metadata, label))


def partition_values(path: str) -> dict[str, int | str | None]:
    """Return the columns encoded in the names of a file's folders, ``label=cat/0.parquet``.

    Spark, Hive, DuckDB and Delta partition tables this way and omit those columns from the files.

    Source: Hive's partition layout: special characters are percent-encoded, and null is
    ``__HIVE_DEFAULT_PARTITION__``.
    """
    values: dict[str, int | str | None] = {}
    for folder in path.split("/")[:-1]:
        name, equals, text = folder.partition("=")
        if not (name and equals):
            continue
        text = unquote(text)
        number = re.fullmatch(r"-?(0|[1-9]\d{0,17})", text)
        values[unquote(name)] = None if text == _NULL else int(text) if number else text
    return values


def _image_column(schema: pa.Schema, config: SourceConfig, path: str) -> tuple[str, str | None]:
    kinds = {field.name: field.type for field in schema}
    encoded = [name for name, kind in kinds.items() if is_encoded(kind)]
    lists = [name for name, kind in kinds.items() if _is_byte_list(kind)]
    texts = [name for name, kind in kinds.items() if _is_text(kind)]
    if "image" in lists and not encoded:
        encoded = ["image"]
    if config.image_column is None:
        candidates = encoded or [name for name in _PATH_NAMES if name in texts] or lists
        # A column of images is preferred by its name among several; a column of paths is not.
        preferred = "image" in encoded
        name = "image" if preferred else candidates[0] if len(candidates) == 1 else None
    else:
        candidates, name = [*encoded, *lists, *texts], config.image_column
    if name is None or name not in candidates:
        raise _no_images(path, kinds, encoded, config)
    return _parts(name, kinds[name])


def _no_images(
    path: str, kinds: Mapping[str, pa.DataType], encoded: Sequence[str], config: SourceConfig
) -> DataError:
    configured = config.image_column
    name_text = "" if configured is None else f" called {configured!r}"
    image_lists = [
        name
        for name, kind in kinds.items()
        if pa.types.is_list(kind) and is_encoded(kind.value_type) and configured in (None, name)
    ]
    cure = (
        f"{', '.join(image_lists)} holds several images per row: write a row for each image first"
        if image_lists
        else f"Set {config.key('image_column')}"
    )
    return DataError(
        f"{path}: no single column of encoded images{name_text}; binary columns: "
        f"{', '.join(encoded) or 'none'}; all: {', '.join(kinds)}. {cure}"
    )


def _parts(name: str, kind: pa.DataType) -> tuple[str, str | None]:
    if _is_text(kind):
        return name, name
    if not pa.types.is_struct(kind):
        return name, None
    path = kind.get_field_index("path")
    paths = f"{name}.path" if path >= 0 and _is_text(kind.field(path).type) else None
    return f"{name}.bytes", paths


def _label_column(names: Sequence[str], config: SourceConfig, path: str) -> str | None:
    name = config.label_column or ("label" if "label" in names else None)
    if name is not None and name not in names:
        raise DataError(
            f"{path}: no column {name!r} for the labels; columns: {', '.join(names)}. "
            f"Set {config.key('label_column')}"
        )
    return name


@lru_cache(maxsize=64)  # the files of a data set share one tuple of names
def _class_label_names(metadata: bytes, label: str | None) -> tuple[str, ...]:
    """Return the names of a ``ClassLabel`` of Hugging Face's ``datasets``; () for a list of labels.

    Source: the schema's metadata, ``huggingface: {"info": {"features": {NAME: {"names": [...],
    "_type": "ClassLabel"}}}}``.
    """
    try:
        feature: Any = json.loads(metadata)["info"]["features"][label] if metadata else None
    except (ValueError, KeyError, TypeError):
        return ()
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def label_advice(
    schema: pa.Schema | None, columns: Columns, in_path: Collection[str] = (), *, key: str
) -> str:
    """Return advice on how to use other labels; it names the columns that could hold classes.

    Args:
        schema: The schema of one of the files; None if none was opened.
        columns: The columns that the source uses.
        in_path: Names of columns whose values are in the names of the file's folders.
        key: The setting that names the column of labels.
    """
    if schema is None:
        return f"set {key} to a column of classes"
    used = {columns.image, columns.paths, columns.label}
    possible = [*(f.name for f in schema if _is_label(f.type)), *in_path]
    names = [name for name in dict.fromkeys(possible) if name not in used]
    if not names:
        return (
            f"use Parquet files with a column of classes (integers or names), and set "
            f"{key} to it; these files have the columns {', '.join(schema.names)}"
        )
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f"set {key} to a column of classes: {', '.join(names[:_MOST_NAMED])}{more}"


def no_classes(column: str | None, why: str, *, key: str) -> str:
    """Return a note that says why a column yields no labels."""
    return (
        f"the column {column!r} {why}; no accuracy is measured with it ({key} selects "
        f"another column)"
    )


def why_no_classes(kind: pa.DataType, first: pa.ChunkedArray) -> str:
    """Return why a column holds no classes, judging by its type; "" if it may hold some.

    Args:
        kind: Type of the column.
        first: Some values of the column, to recognise lists of zeros and ones.
    """
    if not (note := number_classes([pa.array([], kind)]).note):
        return ""
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)) or not len(first):
        return note
    values = pc.list_flatten(first)
    lengths = pc.unique(pc.list_value_length(first)).drop_null().to_pylist()
    if len(lengths) != 1 or lengths[0] < 2 or not set(pc.unique(values).to_pylist()) <= {0, 1}:
        return note
    is_multi_label = len(first) - first.null_count != pc.sum(values.cast(pa.int64())).as_py()
    what = "several labels per image" if is_multi_label else "one-hot"
    return f"holds {kind}: {lengths[0]} zeros and ones per image ({what}), not a class number"


def leaf_index(metadata: pq.FileMetaData, column: str) -> int | None:
    """Return a column's index in a footer, or None; a list's values have a longer path."""
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    if column in paths:
        return paths.index(column)
    return next((n for n, path in enumerate(paths) if path.startswith(f"{column}.")), None)


def as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert images that are lists of bytes, as Spark and pandas write them, to binary."""
    if not _is_byte_list(column.type):
        return column
    return pa.chunked_array(
        [_from_lists(chunk.cast(pa.large_list(pa.int16()))) for chunk in column.chunks],
        pa.large_binary(),
    )


def _from_lists(lists: pa.LargeListArray) -> pa.Array:
    offsets = lists.offsets.to_numpy()
    values = lists.values.fill_null(0).to_numpy()[offsets[0] : offsets[-1]].astype("uint8")
    starts = pa.array(offsets - offsets[0])
    binary = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(lists), [None, starts.buffers()[1], pa.py_buffer(values)]
    )
    return pc.if_else(lists.is_valid(), binary, pa.scalar(None, pa.large_binary()))


def is_encoded(kind: pa.DataType) -> bool:
    """Return whether a column of this type may hold encoded images."""
    if pa.types.is_struct(kind):  # Hugging Face: {"bytes": binary, "path": string}
        place = kind.get_field_index("bytes")
        # pyarrow and pandas write the type null if no value is present.
        return place >= 0 and (
            _is_binary(kind.field(place).type)
            or _is_byte_list(kind.field(place).type)
            or pa.types.is_null(kind.field(place).type)
        )
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_byte_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind)
    return bool(lists and (pa.types.is_uint8(kind.value_type) or pa.types.is_int8(kind.value_type)))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_label(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or _is_text(kind)
        or (pa.types.is_dictionary(kind) and not _is_binary(kind))
    )
