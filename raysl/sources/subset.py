"""Wrap a source to provide only some of its images or labels, or no labels."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysl.sources.labels import Rows
from raysl.sources.pixels import Decoding
from raysl.sources.source import Encoded, Labels, Source, digest


class SourceWrapper:
    """Base class of the wrappers below: forwards everything to another source.

    Args:
        whole: The wrapped source.
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
        """Number of images in each group of the wrapped source."""
        return self.whole.group_sizes

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the images of these rows."""
        return self.whole.read(self._rows(indices))

    def decoding(self, index: int) -> Decoding:
        """Return the decoding settings of the row."""
        return self.whole.decoding(self._row(index))

    def where(self, index: int) -> str:
        """Name a row as the wrapped source does."""
        return self.whole.where(self._row(index))

    def row_id(self, index: int) -> str:
        """Name a row as the wrapped source does."""
        return self.whole.row_id(self._row(index))

    def labels(self) -> Labels | None:
        """Return the class numbers of the wrapped source, or None."""
        return self.whole.labels()

    @property
    def class_names(self) -> list[str]:
        """Class names, by number."""
        return self.whole.class_names

    def _row(self, index: int) -> int:
        return index

    def _rows(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Rows:
        return np.asarray(indices, dtype=np.int64)


class UnlabelledSource(SourceWrapper):
    """A source without its labels, for ``data.labels: none``; its images are the same.

    Labels are never read, so a column that holds no labels does no harm.

    Args:
        whole: The source with labels.
    """

    def __init__(self, whole: Source) -> None:
        super().__init__(whole)
        self.label_advice = "data.labels=none leaves them out"

    def labels(self) -> Labels | None:
        """Return None: the source is unlabelled."""
        return None

    @property
    def class_names(self) -> list[str]:
        """No class names, since the source is unlabelled."""
        return []


class SubsetSource(SourceWrapper):
    """A source with only some of its labels, and with all images or only the labelled ones.

    Memory grows with the number of labels in use, not with the number of images.

    Args:
        whole: The source with all images and labels.
        labelled: Rows whose labels are used, in order, ``(num_labels,)``.
        only: Whether to leave out the images whose labels are not used.
    """

    def __init__(self, whole: Source, labelled: Rows, *, only: bool) -> None:
        super().__init__(whole)
        self.labelled = labelled
        self.only = only
        self.fingerprint = digest(
            whole.fingerprint, str(only), np.ascontiguousarray(labelled, dtype=np.int64).data
        )
        sizes = whole.group_sizes
        self._group_sizes = sizes
        if not only:
            return
        groups = np.searchsorted(np.cumsum(sizes), labelled, side="right")
        counts = np.bincount(groups, minlength=len(sizes)).astype(np.int64)
        used_groups = np.flatnonzero(counts)
        self._group_sizes = counts[used_groups]
        if whole.weights is not None:
            self.weights = whole.weights[used_groups]
        if whole.window_size is not None:
            # A group is read as a whole even if only a few of its images are used.
            share = len(labelled) / max(1, int(sizes.sum()))
            self.window_size = max(1, round(whole.window_size * share))

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Number of images in each group that has any."""
        return self._group_sizes

    def labels(self) -> Labels | None:
        """Return the class numbers, -1 for images whose labels are not used."""
        labels = self.whole.labels()
        assert labels is not None  # some labels are used, so the source has labels
        if self.only:
            return labels[self.labelled]
        used_labels = np.full(len(labels), -1, dtype=np.int64)
        used_labels[self.labelled] = labels[self.labelled]
        return used_labels

    def _row(self, index: int) -> int:
        return int(self.labelled[index]) if self.only else index

    def _rows(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Rows:
        rows = np.asarray(indices, dtype=np.int64)
        return self.labelled[rows] if self.only else rows


def whole_source(source: Source) -> Source:
    """Return the source under a ``SubsetSource``, with all images and labels; else ``source``."""
    return source.whole if isinstance(source, SubsetSource) else source
