"""Result records of runs, pipelines and sweeps, as stored and as ``--json`` prints them."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, cast, final, get_args

Features = Literal["", "untrained_", "pixels_"]
"""Prefix of accuracies: of the trained encoder, of the untrained encoder, of the pixels."""
_OLD, _NEW = "linear_top1", "linear_lbfgs_top1"


PROBES = ("knn", "linear", "linear_lbfgs", "few_shot")
"""The protocols that measure frozen features, in the order of tables."""
TRAINING = ("finetune", "semi_10", "semi_1")
"""The protocols that train the network."""


@final
class Results(TypedDict, total=False):
    """Results of a run: ``results.json``.

    Which keys are present depends on the labels and on the configuration. A protocol's accuracy is
    ``PROTOCOL_top1`` in [0, 1], the mean over its seeds. With several seeds,
    ``PROTOCOL_top1_std`` is the standard deviation. Protocols of frozen features also have keys
    with the other prefixes of :data:`Features`.
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
    """Number of labels that the encoder was fine-tuned on."""
    top1: float
    """Accuracy of a classifier on the test images, in [0, 1]."""
    num_labels: int
    """Number of labels that the classifier was trained on."""
    num_train_labels: int
    num_test_labels: int
    num_bad_test_images: int
    num_classes: int
    steps: int
    repeated_steps: int
    """Number of steps that were done again after faults."""
    num_bad_images: int
    peak_memory_bytes: int
    """Peak memory of the first train worker: of the process, or on its GPU."""
    num_failed_evaluations: int
    run_dir: str
    """The driver adds this key and those below at the end; a run with these keys is complete."""
    images_per_s: float
    data_wait: float
    seconds_to_first_step: float
    seconds: float
    mlflow_run_id: str | None
    mlflow_problem: str | None


class StepResult(TypedDict):
    """The results of a finished step of a pipeline: a row of its table."""

    step: str
    kind: str
    labels: float | None
    """Share of the labels that the step, or its teacher, was trained on; None for pretraining."""
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
    """Return the accuracy that a protocol measured; None if it is missing or not finite."""
    values = cast(Mapping[str, Any], results)
    mean = values.get(f"{features}{protocol}_top1")
    if not isinstance(mean, int | float) or not math.isfinite(mean):
        return None
    return Score(mean, values.get(f"{features}{protocol}_top1_std"))


def measured_probes(results: Results) -> list[str]:
    """Return the protocols that measured some kind of frozen features, in the order of tables."""
    kinds = get_args(Features)
    return [
        probe
        for probe in PROBES
        if any(score_of(results, probe, kind) is not None for kind in kinds)
    ]


def with_prefix(features: Features, accuracies: Mapping[str, float]) -> Results:
    """Add the prefix of one kind of features to the keys of accuracies."""
    return cast(Results, {f"{features}{name}": value for name, value in accuracies.items()})


def with_new_names(results: Mapping[str, Any]) -> Results:
    """Return results with the current key names.

    Version 0.1, which wrote no ``protocols``, used ``linear_top1`` for what is now
    ``linear_lbfgs_top1``; ``linear`` now means the classifier trained by SGD.
    """
    if "protocols" in results:
        return cast(Results, results)
    return cast(Results, {new_name(key): value for key, value in results.items()})


def new_name(key: str) -> str:
    """Convert the name of an accuracy, or of a metric ``final/...``, from version 0.1."""
    return key.removesuffix(_OLD) + _NEW if key.endswith(_OLD) else key


def accuracies_of(results: Results) -> dict[str, float]:
    """Return every measured accuracy, by key, with standard deviations."""
    values = cast(Mapping[str, float], results)
    return {key: value for key, value in values.items() if "top1" in key}
