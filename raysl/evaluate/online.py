"""Measure an encoder during training: nearest neighbours, and measures without labels."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from raysl.augment.crop import Image
from raysl.augment.pipeline import make_views
from raysl.evaluate.features import EvalImages, Rows
from raysl.evaluate.label_free import label_free_measures, pair_views
from raysl.evaluate.protocol import EvaluateConfig, LabelledSets, knn_top1
from raysl.sources.source import Source

NUM_PAIRS = 512
"""Number of images with two views, for the alignment."""
NUM_UNLABELLED = 2048
"""Maximal number of images measured without labels, which bounds the cost of an evaluation for any
source."""
LABEL_FREE = ("rankme", "alpha_req", "alignment", "uniformity")
"""The metrics of :func:`online_metrics` with or without labels, under ``eval/``."""

_SEED = 0
_GROUPS_READ = 32  # number of groups to read if each has enough rows


class ViewPairs(EvalImages):
    """Two fixed views of each image, for the alignment.

    The first views of all images come first, then the second ones: 2P entries for P rows. A bad
    image yields two black views.

    Args:
        source: The source of the images.
        rows: Rows of the images, ``(P,)``.
        size_px: Side of a view.
        num_threads: Number of decoding threads.
    """

    def __init__(self, source: Source, rows: Rows, *, size_px: int, num_threads: int) -> None:
        super().__init__(
            source,
            np.concatenate([rows, rows]),
            np.full(2 * len(rows), -1, dtype=np.int64),
            size_px=size_px,
            crop_fraction=1.0,
            num_threads=num_threads,
        )
        self._views = pair_views(size_px)

    def _square(self, index: int) -> Image:
        row, is_second = int(self.rows[index]), index >= len(self) // 2
        (pair,) = make_views(self.image(index), self._views, seed=_SEED, epoch=0, index=row)
        return pair[int(is_second)]


class OnlineSets(NamedTuple):
    """The images that a run is measured on during training."""

    train: EvalImages
    """Labelled images that train the probes, also measured without labels; some training images if
    there are no labels."""
    pairs: ViewPairs
    """Two views of some images of ``train``."""
    labelled: LabelledSets | None
    """Includes the test images; None without labels."""


class OnlineFeatures(NamedTuple):
    """The features of :class:`OnlineSets`, float32."""

    train: Tensor
    """``(M, D)``"""
    pairs: Tensor
    """``(2P, D)``"""
    test: Tensor | None
    """``(N, D)``"""


def open_online(
    config: EvaluateConfig,
    labelled: LabelledSets | None,
    source: Source,
    *,
    size_px: int,
    num_threads: int,
) -> OnlineSets:
    """Choose the images that a run is measured on during training.

    Args:
        config: The evaluation settings.
        labelled: The run's labelled images; None selects images of the source, the same each time.
        source: The training images.
        size_px: Side of the encoder's input.
        num_threads: Number of decoding threads.
    """
    train = labelled.train if labelled is not None else None
    if train is None:
        rows = spread_rows(source.group_sizes, min(NUM_UNLABELLED, config.max_train_images))
        train = EvalImages(
            source,
            rows,
            np.full(len(rows), -1, dtype=np.int64),
            size_px=size_px,
            crop_fraction=config.crop_fraction,
            num_threads=num_threads,
        )
    # Evenly spaced, because rows are often sorted by class.
    indices = np.linspace(0, len(train) - 1, min(NUM_PAIRS, len(train))).astype(np.int64)
    # Open the source that the rows belong to: a subset or evaluate.source has its own row numbers.
    pairs = ViewPairs(train.source, train.rows[indices], size_px=size_px, num_threads=num_threads)
    return OnlineSets(train, pairs, labelled)


def spread_rows(group_sizes: npt.NDArray[np.int64], most: int) -> Rows:
    """Return at most ``most`` rows of a source, ascending and quick to read.

    If groups are large, the rows come from few groups, because reading one row of a Parquet file
    reads its whole row group.

    Args:
        group_sizes: Rows in each group that is read as a whole, ``(G,)``.
        most: Maximal number of rows.
    """
    starts = np.concatenate([[0], np.cumsum(group_sizes, dtype=np.int64)])
    if starts[-1] <= most:
        return np.arange(starts[-1])
    order = np.random.default_rng(_SEED).permutation(len(group_sizes))
    quota = -(-most // _GROUPS_READ)
    while np.minimum(group_sizes, quota).sum() < most:
        quota *= 2
    chosen: list[Rows] = []
    left = most
    for group in order.tolist():
        count = min(int(group_sizes[group]), quota, left)
        inside = np.linspace(0, int(group_sizes[group]) - 1, count).astype(np.int64)
        chosen.append(starts[group] + inside)
        left -= count
        if left == 0:
            break
    return np.sort(np.concatenate(chosen))


def online_metrics(
    config: EvaluateConfig, sets: OnlineSets, features: OnlineFeatures
) -> dict[str, float]:
    """Return the metrics of an evaluation during training, by their names in the metrics file."""
    half = len(features.pairs) // 2
    free = label_free_measures(features.train, (features.pairs[:half], features.pairs[half:]))
    metrics = {f"eval/{name}": free[name] for name in LABEL_FREE if name in free}
    if sets.labelled is None or features.test is None:
        return metrics
    accuracy = knn_top1(config, sets.labelled, features.train, features.test)
    return {"eval/knn_top1": accuracy} | metrics
