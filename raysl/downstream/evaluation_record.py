"""Result record of an evaluation, stored as ``evaluation.json``. Does not import torch."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from raysl.folder.whole import read_json, write_json


class ProtocolResult(TypedDict):
    """Result of a protocol, over its seeds."""

    version: int
    text: str
    """Name, version and settings in words."""
    mean: float
    """Accuracy on the test images in [0, 1]."""
    deviation: float
    """Standard deviation over the seeds."""
    values: list[float]
    seeds: list[int]
    """Seeds that were run; empty for a deterministic protocol."""
    seconds: float
    images_per_s: float
    settings: dict[str, Any]
    facts: list[dict[str, Any]]
    """Details of each seed."""
    source: NotRequired[str]
    """Source of the images, if it differs from that of the evaluation."""


class FeaturesResult(TypedDict):
    """Size of the features, and the time to compute them."""

    seconds: float
    images_per_s: float
    train: int
    test: int
    width: int
    """Number of features per image."""


class EvaluationResult(TypedDict):
    """The whole record; while an evaluation runs, the results so far."""

    encoder: str
    source: str
    test_source: str
    protocols: dict[str, ProtocolResult]
    label_free: dict[str, float]
    features: FeaturesResult
    classes: list[str]
    bad_images: int


def read_evaluation_result(path: Path) -> EvaluationResult | None:
    """Return the record, or None if the file is missing or damaged."""
    return cast(EvaluationResult | None, read_json(path))


def write_evaluation_result(path: Path, result: EvaluationResult) -> None:
    """Write the record atomically."""
    write_json(path, result)
