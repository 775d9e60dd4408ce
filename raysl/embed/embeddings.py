"""Read embeddings: blocks of features, and the metadata of each image."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raysl.embed.shards import FEATURES, ID, LABEL, ROW, embeddings_folder, read_about
from raysl.errors import DataError
from raysl.pack.folder import PackFolder

Ints = npt.NDArray[np.int64]

_KEPT_BYTES = 2 << 30
_TINY = 1e-12


class _Group(NamedTuple):
    """A row group of a shard."""

    path: str
    number: int
    start: int  # index of its first row among all
    stop: int


class Embeddings:
    """A finished folder of `raysl embed`.

    Args:
        uri: A local path or a URI such as s3://bucket/folder.
        center: Whether to subtract the mean of all features before comparing them. Features of many
            encoders have a large common component, which makes all cosines large.
        kept_bytes: Size limit of the features cached in memory.

    Raises:
        DataError: If it holds no embeddings, unfinished or damaged ones.
    """

    def __init__(self, uri: str, *, center: bool = False, kept_bytes: int = _KEPT_BYTES) -> None:
        self.folder: PackFolder = embeddings_folder(uri)
        self.about: dict[str, Any] = read_about(self.folder)
        self.dim = int(self.about["embed_dim"])
        self._groups: list[_Group] = []
        names = sorted(name for name in self.folder.listed() if name.startswith("features-"))
        rows, labels = [], []
        start = 0
        for name in names:
            path = f"{self.folder.root}/{name}"
            with self._open(path) as file:
                columns = [ROW, *([LABEL] if LABEL in file.schema_arrow.names else [])]
                table = file.read(columns=columns)
                for number in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(number).num_rows
                    if stop > start:
                        self._groups.append(_Group(path, number, start, stop))
                    start = stop
            rows.append(table.column(ROW).to_numpy())
            if LABEL in columns:
                filled = table.column(LABEL).fill_null(-1)
                labels.append(filled.to_numpy().astype(np.int64))
        if start != int(self.about["images"]):
            raise DataError(
                f"{uri}: holds {start:,} images; {self.about['images']:,} were embedded. Shards "
                f"were deleted or added: the same `raysl embed` makes those that are missing"
            )
        self.rows: Ints = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        """The source row of each index."""
        self.labels: Ints | None = np.concatenate(labels) if labels else None
        """The class number of each index, -1 where unknown; None if there are no labels."""
        self.class_names: list[str] = list(self.about.get("class_names", []))
        self._starts = np.array([group.start for group in self._groups], dtype=np.int64)
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        fits = kept_bytes // max(
            1, 4 * self.dim * max((g.stop - g.start for g in self._groups), default=1)
        )
        self._most_kept = max(1, fits)
        self.mean: Tensor | None = self._mean() if center and len(self.rows) else None
        """``(D,)``, subtracted from all features; None if nothing is."""

    def __len__(self) -> int:
        return len(self.rows)

    def places_of(self, rows: Sequence[int] | Ints) -> Ints:
        """Return the indices of rows of the source.

        Raises:
            DataError: If one has no features.
        """
        source_rows = np.asarray(rows, dtype=np.int64)
        places = np.searchsorted(self.rows, source_rows)
        is_there = places < len(self.rows)
        is_there[is_there] = self.rows[places[is_there]] == source_rows[is_there]
        if not is_there.all():
            raise DataError(
                f"{self.folder.uri}: row {int(source_rows[~is_there][0])} has no features: it was "
                f"left out as bad, or is not one of the {int(self.rows.max(initial=-1)) + 1:,} rows"
            )
        return places.astype(np.int64)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of at least ``size`` directions, each with the index of its first row.

        Yields:
            ``(B, D)`` float32 of unit length on the CPU, in order; the last block may be smaller.
        """
        pending: list[Tensor] = []
        start = 0
        for number, group in enumerate(self._groups):
            pending.append(self._directions(number))
            if sum(map(len, pending)) >= size:
                yield start, torch.cat(pending) if len(pending) > 1 else pending[0]
                pending, start = [], group.stop
        if pending:
            yield start, torch.cat(pending)

    def directions(self, places: Ints) -> Tensor:
        """Return the features at some indices, at unit length, ``(n, D)`` float32 on the CPU."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        result = torch.empty((len(places), self.dim))
        for number in np.unique(numbers).tolist():
            own = np.flatnonzero(numbers == number)
            offsets = torch.from_numpy(places[own] - self._starts[number])
            result[torch.from_numpy(own)] = self._directions(number)[offsets]
        return result

    def ids(self, places: Ints) -> list[str]:
        """Return the names of the images at some indices."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        names = np.empty(len(places), dtype=object)
        for number in np.unique(numbers).tolist():
            own = np.flatnonzero(numbers == number)
            column = self._read(number, ID).take(pa.array(places[own] - self._starts[number]))
            names[own] = column.to_pylist()
        return [str(name) for name in names]

    def label_name(self, place: int) -> str | None:
        """Return the class name, or number, at an index; None without a label."""
        if self.labels is None or self.labels[place] < 0:
            return None
        label = int(self.labels[place])
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def to_directions(self, features: Tensor) -> Tensor:
        """Prepare features ``(n, D)`` for comparison: scale them to unit length; zeros stay zero.

        They must match those of the folder: already normalised if the folder's are.
        """
        if self.mean is not None:
            features = features - self.mean
        directions: Tensor = features / features.norm(dim=1, keepdim=True).clamp_min(_TINY)
        return directions

    def _directions(self, number: int) -> Tensor:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        result = self.to_directions(self._features(number))
        self._kept[number] = result
        if len(self._kept) > self._most_kept:
            self._kept.popitem(last=False)
        return result

    def _features(self, number: int) -> Tensor:
        column = self._read(number, FEATURES).combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return torch.from_numpy(values.reshape(-1, self.dim))

    def _mean(self) -> Tensor:
        total = torch.zeros(self.dim, dtype=torch.float64)
        for number in range(len(self._groups)):
            total += self._features(number).double().sum(dim=0)
        return (total / len(self.rows)).float()

    def _read(self, number: int, column: str) -> pa.ChunkedArray:
        group = self._groups[number]
        with self._open(group.path) as file:
            try:
                return file.read_row_group(group.number, columns=[column]).column(column)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{group.path}: cannot be read: {error}") from None

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.folder.filesystem.open_input_file(path))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: cannot be read: {error}; delete it, and embed again"
            ) from None
