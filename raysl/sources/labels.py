"""Convert a column of labels to class numbers and names, and draw subsets of labelled rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raysl.sources.source import Labels
from raysl.sources.storage import readable

Rows = npt.NDArray[np.int64]

_HELD_OUT_SEED = 0
_HELD_OUT_SHARE = 0.2


class Classes(NamedTuple):
    """The classes in a column of labels."""

    labels: Labels | None
    """A class number for each value, ``(num_values,)``, -1 for null; None if the column holds no
    classes."""
    names: list[str]
    """Class names, by number."""
    note: str = ""
    """Why the column holds no classes; "" if it does."""


def number_classes(chunks: Sequence[pa.Array], *, named: Sequence[str] = ()) -> Classes:
    """Number the classes that occur in a column, in sorted order.

    Integers are sorted as numbers; negative ones are not labels. So are floating point numbers that
    are all whole: pandas stores integers with nulls in this way. Other values are sorted as text.

    Args:
        chunks: The chunks of the column, which may differ in type.
        named: Names of the integers 0, 1, ..., if known; the other integers are their own names.
    """
    chunks = [_plain(chunk) for chunk in chunks]
    kinds = [chunk.type for chunk in chunks if not pa.types.is_null(chunk.type)]
    if several := next((kind for kind in kinds if pa.types.is_nested(kind)), None):
        return Classes(None, [], f"holds {several}: several labels per image, not one class")
    if kinds and all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        chunks = [c.cast(pa.int64()) if pa.types.is_null(c.type) else c for c in chunks]
        values = np.concatenate([_numbers(chunk) for chunk in chunks])
        if not (whole := values == np.rint(values))[~np.isnan(values)].all():
            example = values[~np.isnan(values) & ~whole][0]
            return Classes(None, [], f"holds measurements ({example:g}), not classes")
        return _number_integers(chunks, named)
    texts = pa.chunked_array([_names(chunk) for chunk in chunks], pa.large_binary())
    encoded = texts.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    number_of = np.empty(len(order) + 1, dtype=np.int64)
    number_of[order] = np.arange(len(order))
    number_of[-1] = -1
    places = pc.fill_null(encoded.indices.cast(pa.int64()), len(order)).to_numpy()
    names = encoded.dictionary.take(pa.array(order)).to_pylist()
    return Classes(number_of[places], [readable(name) for name in names])


def _number_integers(chunks: Sequence[pa.Array], named: Sequence[str]) -> Classes:
    parts = [pc.fill_null(_whole(chunk), -1).to_numpy() for chunk in chunks]
    values = np.concatenate([np.empty(0, np.int64), *parts])
    is_label = values >= 0
    classes, numbers = np.unique(values[is_label], return_inverse=True)
    labels = np.full(len(values), -1, dtype=np.int64)
    labels[is_label] = numbers
    names = [str(named[v]) if v < len(named) else str(v) for v in classes.tolist()]
    return Classes(labels, names)


def _plain(chunk: pa.Array) -> pa.Array:
    """Decode a dictionary column; convert integers beyond 63 bits, such as hashes, to text."""
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    if pa.types.is_uint64(chunk.type) and (pc.max(chunk).as_py() or 0) > np.iinfo(np.int64).max:
        return chunk.cast(pa.large_string())
    return chunk


def _numbers(chunk: pa.Array) -> npt.NDArray[np.float64]:
    """Return numbers as float64, NaN for null."""
    return np.asarray(chunk.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def _whole(chunk: pa.Array) -> pa.Array:
    if pa.types.is_floating(chunk.type):
        chunk = pc.if_else(pc.is_nan(chunk), pa.scalar(None, chunk.type), chunk)
    return chunk.cast(pa.int64())


def _names(chunk: pa.Array) -> pa.Array:
    kind = chunk.type
    if (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary_view(kind)
    ):
        return chunk.cast(pa.large_binary())
    texts = [None if value is None else str(value).encode() for value in chunk.to_pylist()]
    return pa.array(texts, pa.large_binary())


def balanced_subset(labels: Labels, *, fraction: float, seed: int) -> Rows:
    """Draw a class-balanced subset of the labels and return its indices.

    If a class has too few labels, other classes contribute more. With the same seed, a smaller
    subset is part of a larger one.

    Args:
        labels: ``(M,)`` class numbers.
        fraction: Share of the M labels, in (0, 1]; at least one label of each class is drawn.
        seed: Seed of the draw.

    Returns:
        Sorted indices in [0, M).
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    members = [rng.permutation(np.flatnonzero(labels == number)) for number in classes]
    # Take one label of each class per round, in a random order within the round.
    turn = np.concatenate([np.arange(len(each)) for each in members])
    within = np.repeat(rng.permutation(len(classes)), [len(each) for each in members])
    order = np.concatenate(members)[np.lexsort((within, turn))]
    return np.sort(order[: max(len(classes), round(fraction * len(labels)))])


def hold_out(rows: Rows) -> tuple[Rows, Rows]:
    """Split labelled rows into 80 % for training and 20 % for testing, if there is no test set.

    The same rows always give the same split, for every run and measurement.
    """
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(rows)
    held_out = max(1, round(len(order) * _HELD_OUT_SHARE))
    return np.sort(order[held_out:]), np.sort(order[:held_out])
