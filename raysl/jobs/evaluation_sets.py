"""The images of an evaluation, checked before anything is computed."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raysl.errors import DataError
from raysl.evaluate.features import EvalImages
from raysl.evaluate.protocol import EvaluateConfig, open_labelled
from raysl.evaluate.registry import PROTOCOLS
from raysl.jobs.evaluation_config import EvaluationConfig, EvaluationData, data_config
from raysl.sources.labels import hold_out
from raysl.sources.open import open_source
from raysl.sources.source import Labels

# RankMe's number of images; more do not change it.
_UNLABELLED = 25_600
_EVERY_IMAGE = 1 << 62
_SEED = 0
# How the settings of a run are called here.
_NAMES = (
    (r"evaluate\.source\b", "data.test_source"),
    (r"evaluate\.label_column\b", "data.label_column"),
)


class EvaluationSets(NamedTuple):
    """The images of an evaluation."""

    train: EvalImages
    test: EvalImages
    class_names: list[str]
    """Empty without labels."""

    @property
    def labelled(self) -> bool:
        """Whether there are classes to tell apart."""
        return bool(self.class_names)


def evaluate_config(data: EvaluationData, *, crop_fraction: float = 1.0) -> EvaluateConfig:
    """Return what a run's section ``evaluate`` would be for these images: all of them."""
    return EvaluateConfig(
        source=data.test_source,
        image_column=data.image_column,
        label_column=data.label_column,
        few_shot_labels=1,
        max_train_images=_EVERY_IMAGE,
        max_test_images=data.test_limit or _EVERY_IMAGE,
        crop_fraction=crop_fraction,
    )


def open_sets(
    data: EvaluationData, *, size_px: int, crop_fraction: float, num_threads: int
) -> EvaluationSets:
    """Open the images of an evaluation.

    Without labels they are a random part of the source, a fifth of it as test images.

    Raises:
        DataError: If there are none, or the test images have no labels or other classes.
    """
    opening = data_config(data)
    source = open_source(opening, data=opening)
    config = evaluate_config(data, crop_fraction=crop_fraction)
    try:
        sets = open_labelled(config, opening, source, size_px=size_px, num_threads=num_threads)
    except DataError as error:
        text = str(error)
        for pattern, name in _NAMES:
            text = re.sub(pattern, name, text)
        raise DataError(text) from None
    if sets is not None:
        return EvaluationSets(sets.train, sets.test, sets.class_names)
    rows = np.arange(int(source.group_sizes.sum()))
    if len(rows) > _UNLABELLED:
        rows = np.sort(np.random.default_rng(_SEED).permutation(rows)[:_UNLABELLED])
    parts = [
        EvalImages(
            source,
            part,
            np.full(len(part), -1, dtype=np.int64),
            size_px=size_px,
            crop_fraction=crop_fraction,
            num_threads=num_threads,
        )
        for part in hold_out(rows)
    ]
    return EvaluationSets(parts[0], parts[1], [])


def check_labels(config: EvaluationConfig, sets: EvaluationSets, protocols: Sequence[str]) -> None:
    """Refuse what the labels are too few for.

    Raises:
        DataError: If there are none for what is asked, or too few of a class.
    """
    source = sets.train.source.name
    if not sets.labelled:
        raise DataError(
            f"{source}: no labels of two classes or more, which {', '.join(protocols)} needs; set "
            f"data.label_column, use class folders, or leave --protocols out for the measures that "
            f"need none"
        )
    counts = _counts(sets.train.labels, len(sets.class_names))
    known = np.flatnonzero(counts)
    few = int(known[counts[known].argmin()])
    if "few_shot" in protocols and counts[few] < config.few_shot.labels_per_class:
        raise DataError(
            f"{source}: class {sets.class_names[few]!r} has {counts[few]} labelled images, fewer "
            f"than few_shot.labels_per_class={config.few_shot.labels_per_class}; lower it"
        )
    total = int(counts.sum())
    for name in protocols:
        settings = getattr(config, name, None)
        fraction = getattr(settings, "label_fraction", 1.0)
        if PROTOCOLS[name].measure is None and round(fraction * total) < len(known):
            least = len(known) / total
            raise DataError(
                f"{source}: {100 * fraction:g} % of {total:,} labels is less than one for each of "
                f"{len(known)} classes; leave {name} out, or set {name}.label_fraction to at least "
                f"{least:.3g}"
            )


def _counts(labels: Labels, num_classes: int) -> Labels:
    return np.bincount(labels, minlength=num_classes).astype(np.int64)
