"""Result records of runs, pipelines and sweeps, as stored and as ``--json`` prints them."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, cast, final, get_args

Features = Literal["", "untrained_", "pixels_"]
"""Prefix of the accuracies of the trained encoder, of the same before training, of bare pixels."""
_OLD, _NEW = "linear_top1", "linear_lbfgs_top1"


PROBES = ("knn", "linear", "linear_lbfgs", "few_shot")
"""The protocols that measure frozen features, in the order of tables."""
TRAINING = ("finetune", "semi_10", "semi_1")
"""The protocols that train the network."""


@final
class Results(TypedDict, total=False):
    """Results of a run: ``results.json``.

    Which keys are present depends on the labels and on the configuration. A protocol's accuracy is
    ``PROTOCOL_top1`` in [0, 1], the mean over its seeds; if there are several, their deviation is
    ``PROTOCOL_top1_std``. Of frozen features there are also those with a prefix of
    :data:`Features`.
    """

    knn_top1: float
    linear_lbfgs_top1: float
    untrained_knn_top1: float
    untrained_linear_lbfgs_top1: float
    protocols: dict[str, str]
    """Each protocol's version and settings, as text."""
    few_shot_labels: int
    few_shot_draws: int
    knn_k: int
    knn_temperature: float
    finetune_top1: float
    finetune_labels: int
    """Number of labels that it was fine-tuned on."""
    top1: float
    """Accuracy of a classifier on the test images, in [0, 1]."""
    num_labels: int
    """Number of labels that the classifier was trained on."""
    num_train_labels: int
    num_test_labels: int
    num_bad_test_images: int
    num_classes: int
    steps: int
    num_bad_images: int
    num_failed_evaluations: int
    run_dir: str
    """The driver adds this key and those below last; a run that has them is complete."""
    images_per_s: float
    data_wait: float
    seconds_to_first_step: float
    seconds: float
    mlflow_run_id: str | None
    mlflow_problem: str | None


class StepResult(TypedDict):
    """A finished step of a pipeline: a row of its table."""

    step: str
    kind: str
    labels: float | None
    """Share of the labels that it, or its teacher, saw; None for pretraining."""
    num_labels: int | None
    head_layers: int | None
    teacher: str | None
    student: str | None
    backbone: str
    top1: float | None
    seconds: float
    run_dir: str
    mlflow_run_id: str | None


class PipelineResults(TypedDict):
    """Results of a pipeline: ``pipeline.json``, written after each step."""

    pipeline_dir: str
    finished: int
    steps: list[StepResult]
    mlflow_run_id: str | None


class SweepResults(TypedDict):
    """Results of a sweep: ``summary.json``."""

    sweep_dir: str
    parent_run_id: str | None
    trials: int
    finished: int
    failed: int
    stopped_early: int
    metric: str
    best_trial: int | None
    best_params: dict[str, Any] | None
    best_metric: float | None
    best_config: str | None
    importance: dict[str, float]
    placed_s: float
    training_share: float | None
    mlflow_problem: NotRequired[str | None]


class Score(NamedTuple):
    """An accuracy in [0, 1], and its standard deviation over seeds if there are several."""

    mean: float
    deviation: float | None


def score_of(results: Results, protocol: str, features: Features = "") -> Score | None:
    """Return the accuracy that a protocol measured; None if it is missing or no finite number."""
    values = cast(Mapping[str, Any], results)
    mean = values.get(f"{features}{protocol}_top1")
    if not isinstance(mean, int | float) or not math.isfinite(mean):
        return None
    return Score(mean, values.get(f"{features}{protocol}_top1_std"))


def measured_probes(results: Results) -> list[str]:
    """Return the protocols that measured any kind of frozen features, in the order of tables."""
    kinds = get_args(Features)
    return [
        probe
        for probe in PROBES
        if any(score_of(results, probe, kind) is not None for kind in kinds)
    ]


def with_prefix(features: Features, accuracies: Mapping[str, float]) -> Results:
    """Return accuracies under the keys of one kind of features."""
    return cast(Results, {f"{features}{name}": value for name, value in accuracies.items()})


def with_new_names(results: Mapping[str, Any]) -> Results:
    """Return results under the names of now.

    Until version 0.1, which wrote no ``protocols``, ``linear_top1`` was what ``linear_lbfgs_top1``
    is: since then ``linear`` is the classifier trained by SGD.
    """
    if "protocols" in results:
        return cast(Results, results)
    return cast(Results, {new_name(key): value for key, value in results.items()})


def new_name(key: str) -> str:
    """Return the name of an accuracy, or of a metric ``final/...``, of version 0.1."""
    return key.removesuffix(_OLD) + _NEW if key.endswith(_OLD) else key


def accuracies_of(results: Results) -> dict[str, float]:
    """Return every measured accuracy of the network, by key."""
    values = cast(Mapping[str, float], results)
    return {key: value for key, value in values.items() if "top1" in key}
