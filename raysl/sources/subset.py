"""Wrap a source to show part of its images or labels, or no labels."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysl.sources.labels import Rows
from raysl.sources.pixels import Decoding
from raysl.sources.source import Encoded, Labels, Source, digest


class SeenSource:
    """Forward everything to another source; base class of the wrappers below.

    Args:
        whole: The source.
    """

    def __init__(self, whole: Source) -> None:
        self.whole = whole
        self.name = whole.name
        self.notes = whole.notes
        self.splits = whole.splits
        self.label_advice = whole.label_advice
        self.fingerprint = whole.fingerprint
        self.weights: npt.NDArray[np.float64] | None = whole.weights
        self.window_size: int | None = whole.window_size

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Images in each group of rows that is quick to read as a whole."""
        return self.whole.group_sizes

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the images of these rows."""
        return self.whole.read(self._rows(indices))

    def decoding(self, index: int) -> Decoding:
        """Return the decoding settings of the row."""
        return self.whole.decoding(self._row(index))

    def where(self, index: int) -> str:
        """Name a row as the whole source does."""
        return self.whole.where(self._row(index))

    def row_id(self, index: int) -> str:
        """Name a row as the whole source does."""
        return self.whole.row_id(self._row(index))

    def labels(self) -> Labels | None:
        """Return the class numbers."""
        return self.whole.labels()

    @property
    def class_names(self) -> list[str]:
        """Class names, by number."""
        return self.whole.class_names

    def _row(self, index: int) -> int:
        return index

    def _rows(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Rows:
        return np.asarray(indices, dtype=np.int64)


class UnlabelledSource(SeenSource):
    """A source without its labels, for ``data.labels: none``; its images are the same.

    Labels are never read, so an unusable label column costs nothing.

    Args:
        whole: The source.
    """

    def __init__(self, whole: Source) -> None:
        super().__init__(whole)
        self.label_advice = "data.labels=none leaves them out"

    def labels(self) -> Labels | None:
        """Return None."""
        return None

    @property
    def class_names(self) -> list[str]:
        """Return no names."""
        return []


class SubsetSource(SeenSource):
    """A source that shows some of its labels, and all images or only those labelled ones.

    Memory grows with the number of visible labels, not of images.

    Args:
        whole: The source.
        known: Rows whose labels are visible, in order.
        only: Leave out the images without a visible label.
    """

    def __init__(self, whole: Source, known: Rows, *, only: bool) -> None:
        super().__init__(whole)
        self.known = known
        self.only = only
        self.fingerprint = digest(
            whole.fingerprint, str(only), np.ascontiguousarray(known, dtype=np.int64).data
        )
        sizes = whole.group_sizes
        self._group_sizes = sizes
        if not only:
            return
        groups = np.searchsorted(np.cumsum(sizes), known, side="right")
        counts = np.bincount(groups, minlength=len(sizes)).astype(np.int64)
        kept = np.flatnonzero(counts)
        self._group_sizes = counts[kept]
        if whole.weights is not None:
            self.weights = whole.weights[kept]
        if whole.window_size is not None:
            # A group is read whole even if only a few of its images are kept.
            share = len(known) / max(1, int(sizes.sum()))
            self.window_size = max(1, round(whole.window_size * share))

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Number of kept images in each group that has any."""
        return self._group_sizes

    def labels(self) -> Labels | None:
        """Return the visible class numbers, -1 for the others."""
        labels = self.whole.labels()
        assert labels is not None  # visible labels exist, so the source has labels
        if self.only:
            return labels[self.known]
        seen = np.full(len(labels), -1, dtype=np.int64)
        seen[self.known] = labels[self.known]
        return seen

    def _row(self, index: int) -> int:
        return int(self.known[index]) if self.only else index

    def _rows(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Rows:
        rows = np.asarray(indices, dtype=np.int64)
        return self.known[rows] if self.only else rows


def whole_source(source: Source) -> Source:
    """Return the underlying source with all images, and the labels that evaluation may use."""
    return source.whole if isinstance(source, SubsetSource) else source
