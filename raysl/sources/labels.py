"""From a column of labels to class numbers and names, and to the part of them that is used."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raysl.errors import DataError
from raysl.sources.source import Labels
from raysl.sources.storage import readable

Rows = npt.NDArray[np.int64]

_MOST_CLASSES = 1 << 20
_HELD_OUT_SEED = 0
_HELD_OUT_SHARE = 0.2


def number_classes(chunks: Sequence[pa.Array], *, where: str) -> tuple[Labels, list[str]]:
    """Number the classes of a column.

    Integers are the numbers themselves; all else is names, numbered in sorted order.

    Args:
        chunks: The column; its parts may differ in type.
        where: Names the column in an error message.

    Returns:
        A class number for each value, ``(num_values,)``, -1 for null; the classes' names by number.

    Raises:
        DataError: If integers are too large to be class numbers.
    """
    if all(pa.types.is_integer(chunk.type) for chunk in chunks):
        parts = [pc.fill_null(chunk.cast(pa.int64()), -1).to_numpy() for chunk in chunks]
        labels: Labels = np.concatenate([np.empty(0, np.int64), *parts])
        most = int(labels.max(initial=-1))
        if most >= _MOST_CLASSES:
            raise DataError(
                f"{where}: holds {most}, which is no class number (they are below "
                f"{_MOST_CLASSES:,}); set data.label_column to another column, or to text"
            )
        return labels, [str(number) for number in range(most + 1)]
    values = pa.chunked_array([_names(chunk) for chunk in chunks]).combine_chunks()
    encoded = values.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    number_of = np.empty(len(order) + 1, dtype=np.int64)
    number_of[order] = np.arange(len(order))
    number_of[-1] = -1
    places = pc.fill_null(encoded.indices.cast(pa.int64()), len(order)).to_numpy()
    names = encoded.dictionary.take(pa.array(order)).to_pylist()
    return number_of[places], [readable(name) for name in names]


def _names(chunk: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    kind = chunk.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return chunk.cast(pa.large_binary())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return chunk.cast(pa.large_binary())
    texts = [None if value is None else str(value).encode() for value in chunk.to_pylist()]
    return pa.array(texts, pa.large_binary())


def balanced_subset(labels: Labels, *, fraction: float, seed: int) -> Rows:
    """Return the places of a part of the labels, the same number of each class.

    Where a class has too few, the others fill up; 1 takes all. With the same seed a smaller part
    lies within a larger one.

    Args:
        labels: ``(M,)`` class numbers.
        fraction: Share of the M labels, in (0, 1]; at least one of each class is taken.
        seed: Of the draw.

    Returns:
        Places in [0, M), in order.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    members = [rng.permutation(np.flatnonzero(labels == number)) for number in classes]
    # In turns, one of each class; who comes first in a turn is random too.
    turn = np.concatenate([np.arange(len(each)) for each in members])
    within = np.repeat(rng.permutation(len(classes)), [len(each) for each in members])
    order = np.concatenate(members)[np.lexsort((within, turn))]
    return np.sort(order[: max(len(classes), round(fraction * len(labels)))])


def hold_out(rows: Rows) -> tuple[Rows, Rows]:
    """Split labelled rows for want of a test set: those to learn from, and a fifth to test on.

    The same rows give the same fifth, in every run and for every measure.
    """
    order = np.random.default_rng(_HELD_OUT_SEED).permutation(rows)
    held_out = max(1, round(len(order) * _HELD_OUT_SHARE))
    return np.sort(order[held_out:]), np.sort(order[:held_out])
