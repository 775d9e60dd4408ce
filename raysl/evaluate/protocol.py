"""The evaluation settings of a run, and the measurement of its labelled images."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raysl.config.base import Duration, Idle, PositiveFloat, PositiveInt
from raysl.evaluate.features import EvalImages
from raysl.evaluate.finetune import FinetuneConfig
from raysl.evaluate.knn import knn_accuracy
from raysl.evaluate.linear import few_shot_accuracy, linear_accuracy
from raysl.sources.pixels import ColorProfile, Pages
from raysl.sources.source import DataConfig, SourceConfig
from raysl.track.results import Probed


class EvaluateConfig(SourceConfig):
    """How to measure frozen features, where there are labels.

    ``source`` names the labelled test images. Null takes the validation split beside data.source,
    else its test split; without either, a fifth of the labels is held out from the probes.
    (Pretraining sees those images, without labels.) If the training images have no labels, or none
    of the same classes, a fifth of the labelled images tests, and the others train the probes. What
    cannot be measured is skipped, with a note at the start; missing labels do not stop a
    pretraining.
    """

    idle: ClassVar[tuple[Idle, ...]] = (
        *SourceConfig.idle,
        Idle(
            tuple(name for name in SourceConfig.model_fields if name != "source"),
            {"source": (None,)},
        ),
        Idle(("online",), {"every": (None,)}),
    )
    source: str | None = None  # type: ignore[assignment]
    color_profile: ColorProfile | None = None  # type: ignore[assignment]
    """For the images of evaluate.source; null takes data.color_profile."""
    pages: Pages | None = None  # type: ignore[assignment]
    """As color_profile, and likewise intensity: null takes the value of data, so that an encoder
    sees the same pixels."""
    every: Duration | None = Duration(epochs=5.0)
    """Interval between measurements during training; null: none. Nearest neighbours if there are
    labels, and measures without labels (RankMe, alpha-ReQ, alignment, uniformity)."""
    online: Literal["auto", "background", "blocking"] = "auto"
    """Who measures during training. background: a process beside the train workers, which do not
    wait; values arrive later, under their own step. blocking: the train workers. auto takes
    background on Ray if the workers train on CPUs or a GPU is free beside theirs, else blocking."""
    final: Literal["full", "knn"] = "full"
    """What to measure at the end. full: all probes, on the trained and on the untrained encoder.
    knn: only the nearest neighbours of the trained one, which takes seconds instead of most of a
    minute, as for the trials of a sweep."""
    knn_k: PositiveInt = 20
    """Number of neighbours that vote."""
    knn_temperature: PositiveFloat = 0.07
    """Temperature of a vote, exp(cosine similarity / temperature)."""
    few_shot_labels: PositiveInt = 5
    """Labels for each class of the few-shot probe; skipped if a class has fewer."""
    few_shot_draws: PositiveInt = 5
    """Number of random draws of these labels; the mean is reported."""
    inverse_penalty: PositiveFloat = 1.0
    """C of the logistic regressions."""
    pixel_baseline: bool = True
    """Also measure the bare pixels, a baseline for the encoder. It takes as long as an encoder."""
    max_train_images: PositiveInt = 10_000
    """Maximal number of labelled training images, a fixed random subset."""
    max_test_images: PositiveInt = 10_000
    """Maximal number of test images."""
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Side of the centred square over the image's short side (0.875 is usual for ImageNet)."""
    finetune: FinetuneConfig | None = None
    """Also fine-tune encoder and head at the end of the run, with part of the labels; null does
    not. It takes as long as training for that many epochs."""

    def test_images(self, data: DataConfig) -> SourceConfig:
        """Return the settings that open ``source``; unset pixel settings are the training images'.

        Args:
            data: The training images.
        """
        values = {name: getattr(self, name) for name in SourceConfig.model_fields}
        for name in ("intensity", "color_profile", "pages"):
            values[name] = getattr(data, name) if values[name] is None else values[name]
        return SourceConfig(**values)


class LabelledSets:
    """The labelled images that train the probes and those that test them.

    Args:
        train: Images of at least two classes.
        test: At least one image.
        class_names: Class names by number, for both.
        few_shot: Whether there are enough labels for the few-shot probe.
    """

    def __init__(
        self,
        train: EvalImages,
        test: EvalImages,
        class_names: list[str],
        *,
        few_shot: bool = True,
    ) -> None:
        self.train = train
        self.test = test
        self.class_names = class_names
        self.few_shot = few_shot


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
) -> Probed:
    """Return ``knn_top1``, ``linear_top1``, ``few_shot_top1`` and ``few_shot_top1_std``.

    The last two only with enough labels.
    """
    labels = sets.train.labels, sets.test.labels
    arrays = train.numpy(), labels[0], test.numpy(), labels[1]
    measured: Probed = {
        "knn_top1": knn_top1(config, sets, train, test),
        "linear_top1": linear_accuracy(*arrays, inverse_penalty=config.inverse_penalty),
    }
    if not sets.few_shot:
        return measured
    few = few_shot_accuracy(
        *arrays,
        labels_per_class=config.few_shot_labels,
        num_draws=config.few_shot_draws,
        inverse_penalty=config.inverse_penalty,
    )
    return measured | {"few_shot_top1": few.mean, "few_shot_top1_std": few.deviation}
