"""Open and check the images of an evaluation before anything is computed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raysl.downstream.evaluation_config import (
    EvaluationConfig,
    EvaluationData,
    data_config,
)
from raysl.errors import DataError
from raysl.evaluate.features import EvalImages
from raysl.evaluate.labelled import ImageKeys, choose_labelled, open_chosen
from raysl.evaluate.probes import FewShotConfig
from raysl.evaluate.protocol import EvaluateConfig
from raysl.evaluate.registry import PROTOCOLS
from raysl.sources.labels import hold_out
from raysl.sources.open import open_source
from raysl.sources.source import Labels

# RankMe's number of images; more hardly change it.
_UNLABELLED = 25_600
_EVERY_IMAGE = 1 << 62  # a limit that no source reaches
_SEED = 0
_KEYS = ImageKeys(section="data.test", source="data.test_source", unlabelled="")


class EvaluationSets(NamedTuple):
    """The images of an evaluation."""

    train: EvalImages
    test: EvalImages
    class_names: list[str]
    """Empty if nothing can be measured with labels."""
    notes: tuple[str, ...] = ()
    """What is left out or used unexpectedly, one line each."""
    within: bool = False
    """Whether images of ``data.test_source`` also train the probes."""

    @property
    def labelled(self) -> bool:
        """Whether there are classes to predict."""
        return bool(self.class_names)


def evaluate_config(data: EvaluationData, *, crop_fraction: float = 1.0) -> EvaluateConfig:
    """Return a run's section ``evaluate`` that measures all of these images."""
    test = data.test
    return EvaluateConfig(
        source=data.test_source,
        image_column=test.image_column or data.image_column,
        label_column=test.label_column or data.label_column,
        filter=test.filter,
        limit=test.limit,
        split=test.split,
        intensity=test.intensity,
        color_profile=test.color_profile,
        pages=test.pages,
        few_shot=FewShotConfig(labels_per_class=1),
        max_train_images=_EVERY_IMAGE,
        max_test_images=data.test_limit or _EVERY_IMAGE,
        crop_fraction=crop_fraction,
    )


def open_sets(
    data: EvaluationData, *, size_px: int, crop_fraction: float, num_threads: int
) -> EvaluationSets:
    """Open the images of an evaluation.

    Without labels, they are at most 25,600 random images, a fifth of them for testing.

    Args:
        data: The settings of the images.
        size_px: Side of the encoder's input.
        crop_fraction: Side of the centred square over the image's shorter side.
        num_threads: Number of decoding threads.

    Raises:
        DataError: If there are no images, or the test images have no labels or other classes.
    """
    opening = data_config(data)
    source = open_source(opening, data=opening)
    config = evaluate_config(data, crop_fraction=crop_fraction)
    chosen = choose_labelled(config, opening, source, keys=_KEYS)
    sets = open_chosen(config, chosen, size_px=size_px, num_threads=num_threads)
    if sets is not None:
        return EvaluationSets(sets.train, sets.test, sets.class_names, chosen.notes, chosen.within)
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
    return EvaluationSets(parts[0], parts[1], [], chosen.notes)


def check_labels(config: EvaluationConfig, sets: EvaluationSets, protocols: Sequence[str]) -> None:
    """Check that there are enough labels for the protocols.

    Raises:
        DataError: If a protocol has no labels, or too few of a class.
    """
    source = sets.train.source.name
    if not sets.labelled:
        raise DataError(
            f"{'; '.join(sets.notes)}. {', '.join(protocols)} needs labels of two classes or more; "
            f"leave --protocols out to compute the measures that need none"
        )
    if problem := too_few_for_few_shot(config, sets, protocols):
        raise DataError(f"{source}: {problem}; lower it")
    counts = _counts(sets.train.labels, len(sets.class_names))
    used, total = np.flatnonzero(counts), int(counts.sum())
    for name in protocols:
        if PROTOCOLS[name].measure is not None:
            continue
        if sets.within:
            raise DataError(
                f"{name}: trains on labels, and those of data.source are not of the classes of "
                f"data.test_source; leave {name} out, or give data.source={source}"
            )
        fraction = getattr(getattr(config, name, None), "label_fraction", 1.0)
        if round(fraction * total) < len(used):
            least = len(used) / total
            raise DataError(
                f"{source}: {100 * fraction:g} % of {total:,} labels is less than one for each of "
                f"{len(used)} classes; leave {name} out, or set {name}.label_fraction to at least "
                f"{least:.3g}"
            )


def too_few_for_few_shot(
    config: EvaluationConfig, sets: EvaluationSets, protocols: Sequence[str]
) -> str:
    """Return which class has too few labels for protocol few_shot; empty if none has."""
    if "few_shot" not in protocols or not sets.labelled:
        return ""
    counts = _counts(sets.train.labels, len(sets.class_names))
    used = np.flatnonzero(counts)
    few = int(used[counts[used].argmin()])
    wanted = config.few_shot.labels_per_class
    if counts[few] >= wanted:
        return ""
    return (
        f"class {sets.class_names[few]!r} has {counts[few]} labelled images, fewer than "
        f"few_shot.labels_per_class={wanted}"
    )


def _counts(labels: Labels, num_classes: int) -> Labels:
    return np.bincount(labels, minlength=num_classes).astype(np.int64)
