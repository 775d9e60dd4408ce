"""The protocols of a run: which images, which measures, with which settings."""

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from raysl.config.base import Duration, PositiveFloat, PositiveInt
from raysl.errors import DataError
from raysl.evaluate.features import EvalImages, Rows
from raysl.evaluate.finetune import FinetuneConfig
from raysl.evaluate.knn import knn_accuracy
from raysl.evaluate.linear import few_shot_accuracy, linear_accuracy
from raysl.sources.labels import hold_out
from raysl.sources.open import open_source
from raysl.sources.source import BUILT_IN, DataConfig, Labels, Source, SourceConfig

_SUBSET_SEED = 0
_FEWEST_CLASSES = 2


class EvaluateConfig(SourceConfig):
    """How frozen features are measured, where there are labels.

    ``source`` names the labelled test images. Null takes the test split of a built-in set; for a
    labelled folder or Parquet without a test set, a fifth of the labels is held out from the
    probes. (Pretraining sees those images, without labels.)
    """

    source: str | None = None  # type: ignore[assignment]
    every: Duration | None = Duration(epochs=5.0)
    """From one measurement during training to the next; null: none. Nearest neighbours where there
    are labels, and measures that need none (RankMe, alpha-ReQ, alignment, uniformity)."""
    online: Literal["auto", "background", "blocking"] = "auto"
    """Who measures during training. background: a process beside the train workers, which do not
    wait; values arrive later, under the step they belong to. blocking: the train workers. auto
    takes background on Ray where the workers train on CPUs or a GPU is left beside theirs, else
    blocking."""
    final: Literal["full", "knn"] = "full"
    """What is measured at the end. full: all probes, on the trained and on the untrained encoder.
    knn: the nearest neighbours of the trained one alone, seconds instead of most of a minute, as
    the trials of a sweep want it."""
    knn_k: PositiveInt = 20
    knn_temperature: PositiveFloat = 0.07
    few_shot_labels: PositiveInt = 5
    """Labels a class of the few-shot probe."""
    few_shot_draws: PositiveInt = 5
    """Random draws of these labels; the mean is reported."""
    inverse_penalty: PositiveFloat = 1.0
    """C of the logistic regressions."""
    pixel_baseline: bool = True
    """Measure the bare pixels too: what an encoder has to beat. It takes as long as an encoder."""
    max_train_images: PositiveInt = 10_000
    """Most labelled training images used, a random subset that is always the same."""
    max_test_images: PositiveInt = 10_000
    """Most test images used."""
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Side of the centred square over the image's shorter side (0.875 is usual for ImageNet)."""
    finetune: FinetuneConfig | None = None
    """At the end of the run, also fine-tune encoder and head on a part of the labels; null does
    not. It takes as long as so much training."""


def has_test_set(config: EvaluateConfig, data: DataConfig) -> bool:
    """Whether test images lie apart from the training images, so that none need be held out."""
    return config.source is not None or data.source in BUILT_IN


class LabelledSets:
    """The labelled images that train the probes and those that test them."""

    def __init__(self, train: EvalImages, test: EvalImages, class_names: list[str]) -> None:
        self.train = train
        self.test = test
        self.class_names = class_names


def open_labelled(
    config: EvaluateConfig, data: DataConfig, source: Source, *, size_px: int, num_threads: int
) -> LabelledSets | None:
    """Open the labelled images of a run, or return None if there are no labels.

    Args:
        config: What to evaluate on.
        data: The training data's configuration.
        source: The training images.
        size_px: Side of the encoder's input.
        num_threads: Threads that decode.

    Raises:
        DataError: If a test source is given but has no labels, or other classes, or if there are
            too few labels for what is to be done with them.
    """
    labels = source.labels()
    if labels is None or len(np.unique(labels[labels >= 0])) < _FEWEST_CLASSES:
        if config.source is not None:
            raise DataError(
                f"evaluate.source={config.source}: the training images ({source.name}) have no "
                f"labels to train a probe with; drop evaluate.source or set data.label_column"
            )
        if config.finetune is not None:
            raise DataError(
                f"evaluate.finetune: the training images ({source.name}) have no labels; set it to "
                f"null, or set data.label_column"
            )
        return None
    rows = np.flatnonzero(labels >= 0)
    if has_test_set(config, data):
        whole = data.model_copy(update={"limit": None})
        test = open_source(config if config.source is not None else whole, split="test", data=data)
        test_labels = _labels_like(test, source)
        test_rows = np.flatnonzero(test_labels >= 0)
    else:
        test, test_labels = source, labels
        rows, test_rows = hold_out(rows)

    def images(of: Source, numbers: Labels, which: Rows, most: int) -> EvalImages:
        if len(which) > most:
            which = np.sort(np.random.default_rng(_SUBSET_SEED).permutation(which)[:most])
        return EvalImages(
            of,
            which,
            numbers[which],
            size_px=size_px,
            crop_fraction=config.crop_fraction,
            num_threads=num_threads,
        )

    train = images(source, labels, rows, config.max_train_images)
    _check_few_shot(train.labels, source, config)
    return LabelledSets(
        train, images(test, test_labels, test_rows, config.max_test_images), source.class_names
    )


def _labels_like(test: Source, train: Source) -> Labels:
    """Return the test images' labels as the training source numbers its classes."""
    labels = test.labels()
    if labels is None or not (labels >= 0).any():
        raise DataError(f"evaluate.source={test.name}: no labels; set evaluate.label_column")
    numbers = {name: number for number, name in enumerate(train.class_names)}
    unknown = [name for name in test.class_names if name not in numbers]
    if unknown:
        raise DataError(
            f"evaluate.source={test.name}: classes {unknown[:5]} are not among those of "
            f"{train.name}: {train.class_names[:5]}..."
        )
    places = np.array([numbers[name] for name in test.class_names], dtype=np.int64)
    return np.where(labels >= 0, places[labels], labels)


def _check_few_shot(labels: Labels, source: Source, config: EvaluateConfig) -> None:
    """Refuse before the training what the few-shot probe could not do after it."""
    numbers, counts = np.unique(labels, return_counts=True)
    if counts.min() < config.few_shot_labels:
        name = source.class_names[int(numbers[counts.argmin()])]
        raise DataError(
            f"{source.name}: class {name!r} has {counts.min()} labelled images for the probes, "
            f"fewer than evaluate.few_shot_labels={config.few_shot_labels}; lower it"
        )


def knn_top1(config: EvaluateConfig, sets: LabelledSets, train: Tensor, test: Tensor) -> float:
    """Return the nearest-neighbour accuracy of features ``(M, D)`` and ``(N, D)``."""
    return knn_accuracy(
        train,
        torch.from_numpy(sets.train.labels),
        test,
        torch.from_numpy(sets.test.labels),
        k=config.knn_k,
        temperature=config.knn_temperature,
    )


def all_protocols(
    config: EvaluateConfig, sets: LabelledSets, train: Tensor, test: Tensor
) -> dict[str, float]:
    """Return ``knn_top1``, ``linear_top1``, ``few_shot_top1`` and ``few_shot_top1_std``."""
    labels = sets.train.labels, sets.test.labels
    arrays = train.numpy(), labels[0], test.numpy(), labels[1]
    few = few_shot_accuracy(
        *arrays,
        labels_per_class=config.few_shot_labels,
        num_draws=config.few_shot_draws,
        inverse_penalty=config.inverse_penalty,
    )
    return {
        "knn_top1": knn_top1(config, sets, train, test),
        "linear_top1": linear_accuracy(*arrays, inverse_penalty=config.inverse_penalty),
        "few_shot_top1": few.mean,
        "few_shot_top1_std": few.deviation,
    }
