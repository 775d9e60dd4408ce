"""Result records of runs, pipelines and sweeps, as stored and as ``--json`` prints them."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, cast, final

Features = Literal["", "untrained_", "pixels_"]
"""Prefix of the accuracies of the trained encoder, of the same before training, of bare pixels."""


class Probed(TypedDict, total=False):
    """Accuracies of frozen features in [0, 1]; few-label keys only if there are enough labels."""

    knn_top1: float
    linear_top1: float
    few_shot_top1: float
    few_shot_top1_std: float


@final
class Results(Probed, total=False):
    """Results of a run: ``results.json``.

    Which keys are present depends on the labels and on the configuration.
    """

    untrained_knn_top1: float
    untrained_linear_top1: float
    untrained_few_shot_top1: float
    untrained_few_shot_top1_std: float
    pixels_knn_top1: float
    pixels_linear_top1: float
    pixels_few_shot_top1: float
    pixels_few_shot_top1_std: float
    few_shot_labels: int
    few_shot_draws: int
    knn_k: int
    knn_temperature: float
    finetune_top1: float
    finetune_labels: int
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


class Scores(NamedTuple):
    """Accuracies of one kind of features; None where they were not measured."""

    knn_top1: float | None
    linear_top1: float | None
    few_shot_top1: float | None
    few_shot_top1_std: float | None


def scores_of(results: Results, features: Features) -> Scores:
    """Return the accuracies of one kind of features."""
    values = cast(Mapping[str, float], results)
    return Scores(*(values.get(f"{features}{name}") for name in Scores._fields))


def with_prefix(features: Features, probed: Probed) -> Results:
    """Return accuracies under the keys of one kind of features."""
    return cast(Results, {f"{features}{name}": value for name, value in probed.items()})


def accuracies_of(results: Results) -> dict[str, float]:
    """Return every measured accuracy of the network, by key."""
    values = cast(Mapping[str, float], results)
    return {key: value for key, value in values.items() if "top1" in key}
