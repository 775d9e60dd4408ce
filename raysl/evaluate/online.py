"""What is measured of an encoder while it trains: nearest neighbours, and what needs no labels."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from raysl.augment.crop import Image
from raysl.augment.pipeline import make_views
from raysl.evaluate.features import EvalImages, Rows
from raysl.evaluate.label_free import label_free, pair_views
from raysl.evaluate.protocol import EvaluateConfig, LabelledSets, knn_top1
from raysl.sources.source import Source

NUM_PAIRS = 512
"""Images whose two views measure the alignment."""
NUM_UNLABELLED = 2048
"""Most images that are measured where there are no labels: the cost of an evaluation is bounded
whatever the size of the source."""
LABEL_FREE = ("rankme", "alpha_req", "alignment", "uniformity")
"""What :func:`online_metrics` measures with labels or without, under ``eval/``."""

_SEED = 0
_GROUPS_READ = 32


class ViewPairs(EvalImages):
    """The two views of each of some images that alignment is measured on, the same every time.

    The first views of all come first, then the second ones: 2P places for P rows. Bad images give
    two black views.

    Args:
        source: Where the images are.
        rows: Which of them, ``(P,)``.
        size_px: Side of a view.
        num_threads: Threads that decode.
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

    def _square(self, place: int) -> Image:
        row, second = int(self.rows[place]), place >= len(self) // 2
        (made,) = make_views(self.image(place), self._views, seed=_SEED, epoch=0, index=row)
        return made[int(second)]


class OnlineSets(NamedTuple):
    """The images that a run is measured on while it trains."""

    train: EvalImages
    """Labelled images that train the probes, or a few of the training images where there are none;
    measured without labels."""
    pairs: ViewPairs
    """Two views of some of these."""
    labelled: LabelledSets | None
    """With the test images; None where there are no labels."""


class OnlineFeatures(NamedTuple):
    """What an encoder makes of :class:`OnlineSets`, float32."""

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
    """Choose the images that a run is measured on while it trains.

    Args:
        config: How it is evaluated.
        labelled: Its labelled images; None takes a few of the source's, always the same.
        source: The training images.
        size_px: Side of the encoder's input.
        num_threads: Threads that decode.
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
    # Evenly spaced: rows are often sorted by class.
    places = np.linspace(0, len(train) - 1, min(NUM_PAIRS, len(train))).astype(np.int64)
    # Of the source whose rows they are: a part of it, or evaluate.source, numbers its own.
    pairs = ViewPairs(train.source, train.rows[places], size_px=size_px, num_threads=num_threads)
    return OnlineSets(train, pairs, labelled)


def spread_rows(group_sizes: npt.NDArray[np.int64], most: int) -> Rows:
    """Return at most ``most`` rows of a source, ascending, that are quick to read.

    They lie in few groups where groups are large: a row of a Parquet file costs its row group.

    Args:
        group_sizes: Rows of each group that is read as a whole, ``(G,)``.
        most: How many.
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
    """Return what an evaluation during training logs, by the names of the metrics file."""
    half = len(features.pairs) // 2
    free = label_free(features.train, (features.pairs[:half], features.pairs[half:]))
    metrics = {f"eval/{name}": free[name] for name in LABEL_FREE if name in free}
    if sets.labelled is None or features.test is None:
        return metrics
    accuracy = knn_top1(config, sets.labelled, features.train, features.test)
    return {"eval/knn_top1": accuracy} | metrics
