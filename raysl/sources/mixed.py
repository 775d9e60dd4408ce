"""Concatenate several weighted sources to one source."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysl.sources.pixels import Decoding
from raysl.sources.source import Encoded, Labels, Source, digest


class MixedSource:
    """The rows of several sources, one source after another.

    Classes of equal name are merged. The images of sources without labels are unlabelled.

    Args:
        parts: The sources to concatenate.
        weights: For each source, how often an epoch reads each of its images.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.name = " + ".join(part.name for part in parts)
        self.notes = tuple(f"{p.name}: {note}" for p in parts for note in p.notes)
        self.splits = self.parts[0].splits
        self.label_advice = self.parts[0].label_advice
        sizes = [part.group_sizes for part in parts]
        self._group_sizes = np.concatenate(sizes)
        counts = [len(groups) for groups in sizes]
        self.weights: npt.NDArray[np.float64] | None = np.repeat(
            np.asarray(weights, dtype=np.float64), counts
        )
        self._starts = np.concatenate([[0], np.cumsum([int(groups.sum()) for groups in sizes])])
        self.fingerprint = digest(
            *(
                f"{part.fingerprint}:{weight!r}\n"
                for part, weight in zip(parts, weights, strict=True)
            )
        )
        windows = [part.window_size for part in parts if part.window_size is not None]
        self.window_size: int | None = min(windows, default=None)

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Images in each group of each source."""
        return self._group_sizes

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the images of these rows, with one read per source."""
        rows = np.asarray(indices, dtype=np.int64)
        part_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        result: list[Encoded] = [b""] * len(rows)
        for number in np.unique(part_of_row).tolist():
            positions = np.flatnonzero(part_of_row == number)
            images = self.parts[number].read(rows[positions] - self._starts[number])
            for position, image in zip(positions.tolist(), images, strict=True):
                result[position] = image
        return result

    def decoding(self, index: int) -> Decoding:
        """Return the decoding settings of the row's source."""
        part, row = self._part_of(index)
        return part.decoding(row)

    def where(self, index: int) -> str:
        """Name a row as its source does."""
        part, row = self._part_of(index)
        return part.where(row)

    def row_id(self, index: int) -> str:
        """Name a row by its source and that source's ``row_id``."""
        part, row = self._part_of(index)
        return f"{part.name}/{part.row_id(row)}"

    def _part_of(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])

    def labels(self) -> Labels | None:
        """Return class numbers over all sources, -1 for unlabelled images; None without labels."""
        numbers = {name: number for number, name in enumerate(self.class_names)}
        columns, labelled = [], False
        for part, size in zip(self.parts, np.diff(self._starts), strict=True):
            labels = part.labels()
            if labels is None:
                columns.append(np.full(size, -1, dtype=np.int64))
                continue
            labelled = True
            # The last entry, at index -1, maps -1 (no label) to -1.
            number_of = np.array([*(numbers[name] for name in part.class_names), -1], np.int64)
            columns.append(number_of[np.maximum(labels, -1)])
        return np.concatenate(columns) if labelled else None

    @property
    def class_names(self) -> list[str]:
        """Class names by number, in the order of the sources."""
        return list(dict.fromkeys(name for part in self.parts for name in part.class_names))
