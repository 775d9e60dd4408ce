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

_CACHE_BYTES = 2 << 30
_SMALLEST_LENGTH = 1e-12  # of a vector that is divided by its length


class _Group(NamedTuple):
    """A row group of a shard."""

    path: str
    number: int
    start: int  # position of its first row among all images
    stop: int


class Embeddings:
    """A finished folder of `raysl embed`.

    Args:
        uri: A local path or a URI such as s3://bucket/folder.
        center: Whether to subtract the mean of all features before comparing them. Features of many
            encoders have a large common component, which makes all cosines large.
        cache_bytes: Largest size of the features that are cached in memory.

    Raises:
        DataError: If the folder holds no embeddings, or they are unfinished or damaged.
    """

    def __init__(self, uri: str, *, center: bool = False, cache_bytes: int = _CACHE_BYTES) -> None:
        self.folder: PackFolder = embeddings_folder(uri)
        self.about: dict[str, Any] = read_about(self.folder)
        self.dim = int(self.about["embed_dim"])
        self._groups: list[_Group] = []
        names = sorted(name for name in self.folder.file_sizes() if name.startswith("features-"))
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
                f"were deleted or added; the same `raysl embed` again writes missing shards"
            )
        self.rows: Ints = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        """The source row at each position."""
        self.labels: Ints | None = np.concatenate(labels) if labels else None
        """The class number at each position, -1 where unknown; None if there are no labels."""
        self.class_names: list[str] = list(self.about.get("class_names", []))
        self._starts = np.array([group.start for group in self._groups], dtype=np.int64)
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        fits = cache_bytes // max(
            1, 4 * self.dim * max((g.stop - g.start for g in self._groups), default=1)
        )
        self._max_cached = max(1, fits)
        self.mean: Tensor | None = self._mean() if center and len(self.rows) else None
        """``(D,)``, subtracted from all features; None if nothing is subtracted."""

    def __len__(self) -> int:
        return len(self.rows)

    def positions_of(self, rows: Sequence[int] | Ints) -> Ints:
        """Return the positions of rows of the source.

        Raises:
            DataError: If a row has no features.
        """
        source_rows = np.asarray(rows, dtype=np.int64)
        positions = np.searchsorted(self.rows, source_rows)
        has_features = positions < len(self.rows)
        found_rows = self.rows[positions[has_features]]
        has_features[has_features] = found_rows == source_rows[has_features]
        if not has_features.all():
            row, num_rows = int(source_rows[~has_features][0]), int(self.rows.max(initial=-1)) + 1
            raise DataError(
                f"{self.folder.uri}: row {row} has no features: it was left out as a bad image, or "
                f"is not one of the {num_rows:,} rows"
            )
        return positions.astype(np.int64)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of at least ``size`` directions; the last block may be smaller.

        Yields:
            Position of the first row, and ``(B, D)`` float32 of unit length on the CPU, in order.
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

    def directions(self, positions: Ints) -> Tensor:
        """Return the features at ``(n,)`` positions: ``(n, D)`` float32 of unit length."""
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        result = torch.empty((len(positions), self.dim))
        for number in np.unique(numbers).tolist():
            in_group = np.flatnonzero(numbers == number)
            offsets = torch.from_numpy(positions[in_group] - self._starts[number])
            result[torch.from_numpy(in_group)] = self._directions(number)[offsets]
        return result

    def ids(self, positions: Ints) -> list[str]:
        """Return the ids of the images at ``(n,)`` positions."""
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        ids = np.empty(len(positions), dtype=object)
        for number in np.unique(numbers).tolist():
            in_group = np.flatnonzero(numbers == number)
            offsets = pa.array(positions[in_group] - self._starts[number])
            ids[in_group] = self._read(number, ID).take(offsets).to_pylist()
        return [str(row_id) for row_id in ids]

    def label_name(self, position: int) -> str | None:
        """Return the class name, or the number of an unnamed class; None without a label."""
        if self.labels is None or self.labels[position] < 0:
            return None
        label = int(self.labels[position])
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def to_directions(self, features: Tensor) -> Tensor:
        """Subtract the mean from features ``(n, D)`` if centred, and scale them to unit length.

        Zeros stay zero. The features must be normalised if those of the folder are.
        """
        if self.mean is not None:
            features = features - self.mean
        directions: Tensor = features / features.norm(dim=1, keepdim=True).clamp_min(
            _SMALLEST_LENGTH
        )
        return directions

    def _directions(self, number: int) -> Tensor:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        result = self.to_directions(self._features(number))
        self._cache[number] = result
        if len(self._cache) > self._max_cached:
            self._cache.popitem(last=False)
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
