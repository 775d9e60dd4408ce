"""The evaluation settings of a run, and the measurement of its labelled images."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from raysl.config.base import Duration, Idle, PositiveInt
from raysl.errors import ConfigError
from raysl.evaluate.features import EvalImages
from raysl.evaluate.probes import ProbeSets, measure_knn
from raysl.evaluate.registry import (
    FINAL,
    PROTOCOLS,
    ProtocolSettings,
    check_protocols,
    measure_unit,
    units_of,
)
from raysl.methods.base import MethodConfig
from raysl.sources.pixels import ColorProfile, Pages
from raysl.sources.source import DataConfig, SourceConfig
from raysl.track.results import TRAINING, Results


class EvaluateConfig(ProtocolSettings, SourceConfig):
    """How to measure frozen features.

    ``source`` names the labelled test images. Null uses the validation split of data.source, else
    its test split; without either, a fifth of the labelled images is held out from the probes.
    (Pretraining sees those images, without labels.) If the training images have no labels of the
    test classes, a fifth of the labelled test images tests the probes and the others train them.
    Measurements that are not possible are skipped, with a note at the start; missing labels do not
    stop a pretraining.
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
    """Treatment of colour profiles in evaluate.source; null uses data.color_profile."""
    pages: Pages | None = None  # type: ignore[assignment]
    """Treatment of multi-page files in evaluate.source. Null uses the value of data, here and for
    intensity and color_profile, so that the encoder sees test images as it saw training images."""
    every: Duration | None = Duration(epochs=5.0)
    """Interval between measurements during training; null measures only at the end. Each measures
    nearest neighbours, if there are labels, and RankMe, alpha-ReQ, alignment and uniformity."""
    online: Literal["auto", "background", "blocking"] = "auto"
    """Process that measures during training. background: another process, for which training does
    not wait; values are logged later, under their own step. blocking: the train workers. auto uses
    background on Ray if the workers train on CPUs or a spare GPU is free, else blocking."""
    final: tuple[str, ...] = FINAL
    """Protocols to measure at the end, named as in ``raysl evaluate --protocols``; the settings of
    each are in the section of its name. finetune, semi_1 and semi_10 train a copy of the
    network."""
    untrained_baseline: bool | None = None
    """Also measure the encoder before training, as a baseline. null: only if ``final`` measures
    frozen features by more than knn; a sweep's trials measure knn alone, which takes seconds."""
    pixel_baseline: bool | None = None
    """Also measure the bare pixels, which takes as long as an encoder. null: decided as for
    ``untrained_baseline``."""
    max_train_images: PositiveInt = 10_000
    """Maximal number of labelled training images, a fixed random subset."""
    max_test_images: PositiveInt = 10_000
    """Maximal number of test images."""
    crop_fraction: Annotated[float, Field(ge=0.01, le=1.0)] = 1.0
    """Side of the centred square over the image's short side (0.875 is usual for ImageNet)."""

    @field_validator("final")
    @classmethod
    def _are_protocols(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return known_protocols(names)

    @classmethod
    def idle_by(cls, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the settings of training protocols not named in ``final``, with the reason."""
        final = values.get("final")
        if isinstance(final, list):  # a string is a value of an earlier version
            for name in (each for each in TRAINING if each not in final):
                why = f"with evaluate.final=[{', '.join(map(str, final))}], without {name}"
                for key in PROTOCOLS[name].settings.model_fields:
                    yield f"{name}.{key}", why

    def check_head_layers(self, method: MethodConfig, *, is_vit: bool) -> None:
        """Refuse to fine-tune from a layer that the method's projection head does not have."""
        most = method.projection_head_layers(is_vit=is_vit)
        for name in self.trained:
            layers = getattr(self, name).head_layers
            if layers > most:
                raise ConfigError(
                    f"evaluate.{name}.head_layers={layers}: the projection head of method "
                    f"{method.name} ends at layer {most}; use at most {most}"
                )

    @property
    def probes(self) -> tuple[str, ...]:
        """The protocols of ``final`` that measure frozen features."""
        return tuple(name for name in self.final if name not in TRAINING)

    @property
    def trained(self) -> tuple[str, ...]:
        """The protocols of ``final`` that train the network."""
        return tuple(name for name in self.final if name in TRAINING)

    @property
    def is_quick(self) -> bool:
        """Whether the evaluation of the last step measures all that is measured at the end."""
        return not (set(self.probes) - {"knn"} or self.measures_untrained or self.measures_pixels)

    @property
    def measures_untrained(self) -> bool:
        """Whether the encoder before training is measured."""
        return self._is_measured(self.untrained_baseline)

    @property
    def measures_pixels(self) -> bool:
        """Whether the bare pixels are measured."""
        return self._is_measured(self.pixel_baseline)

    def _is_measured(self, baseline: bool | None) -> bool:
        beyond_knn = bool(set(self.probes) - {"knn"})
        return bool(self.probes) and (beyond_knn if baseline is None else baseline)

    def test_images(self, data: DataConfig) -> SourceConfig:
        """Return the settings that open ``source``; unset pixel settings are those of ``data``.

        Args:
            data: The settings of the training images.
        """
        values = {name: getattr(self, name) for name in SourceConfig.model_fields}
        for name in ("intensity", "color_profile", "pages"):
            values[name] = getattr(data, name) if values[name] is None else values[name]
        return SourceConfig(**values)


class LabelledSets:
    """The labelled images that train the probes and those that test them.

    Args:
        train: Images that train the probes, of at least two classes.
        test: Images that test the probes, at least one.
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


def known_protocols(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without duplicates if all are protocols.

    Raises:
        ValueError: If a name is unknown, or there is none.
    """
    try:
        return check_protocols(names, where="protocols", known=tuple(PROTOCOLS))
    except ConfigError as error:
        raise ValueError(str(error)) from None


def probe_sets(sets: LabelledSets, train: Tensor, test: Tensor) -> ProbeSets:
    """Return features ``(M, D)`` and ``(N, D)`` with their labels."""
    return ProbeSets(train.numpy(), sets.train.labels, test.numpy(), sets.test.labels)


def knn_top1(config: EvaluateConfig, sets: LabelledSets, train: Tensor, test: Tensor) -> float:
    """Return the nearest-neighbour accuracy of features ``(M, D)`` and ``(N, D)``."""
    return measure_knn(config.knn, probe_sets(sets, train, test), seed=0, device="cpu").top1


def measure_probes(
    config: EvaluateConfig, sets: LabelledSets, train: Tensor, test: Tensor
) -> dict[str, float]:
    """Measure the probes of ``evaluate.final`` on features ``(M, D)`` and ``(N, D)``.

    Returns:
        For each protocol ``PROTOCOL_top1``, the mean over its seeds, and for several seeds their
        standard deviation, ``PROTOCOL_top1_std``; few_shot only with enough labels.
    """
    arrays, results = probe_sets(sets, train, test), dict[str, float]()
    for name in config.probes:
        if name == "few_shot" and not sets.few_shot:
            continue
        units = units_of(config, name)
        values = [measure_unit(unit, arrays, device="cpu")[0].top1 for unit in units]
        results |= mean_and_std(name, values)
    return results


def mean_and_std(protocol: str, values: list[float]) -> dict[str, float]:
    """Return the result keys of a protocol for the accuracies of its seeds."""
    mean = {f"{protocol}_top1": float(np.mean(values))}
    return mean | ({f"{protocol}_top1_std": float(np.std(values))} if len(values) > 1 else {})


def protocol_texts(config: EvaluateConfig, names: Iterable[str]) -> dict[str, str]:
    """Return the text that identifies each protocol's version and settings, by name."""
    return {name: PROTOCOLS[name].text(getattr(config, name)) for name in names}


def facts_of(config: EvaluateConfig, sets: LabelledSets) -> Results:
    """Return the counts and settings behind :func:`measure_probes`, for ``results.json``."""
    facts: Results = {
        "num_train_labels": len(sets.train),
        "num_test_labels": len(sets.test),
        "num_bad_test_images": len(sets.test.bad),
        "num_classes": len(sets.class_names),
        "knn_k": config.knn.k,
        "knn_temperature": config.knn.temperature,
        "protocols": protocol_texts(config, config.probes),
    }
    if sets.few_shot and "few_shot" in config.probes:
        facts["few_shot_labels"] = config.few_shot.labels_per_class
        facts["few_shot_draws"] = config.few_shot.draws
    return facts
