"""What an evaluation measured: ``evaluation.json`` of its folder. Loads no torch."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from raysl.folder.whole import read_json, write_json


class ProtocolResult(TypedDict):
    """What a protocol gave, over its seeds."""

    version: int
    text: str
    """Its settings in words."""
    mean: float
    """Accuracy on the test images in [0, 1]."""
    deviation: float
    values: list[float]
    seeds: list[int]
    """Empty where nothing is random."""
    seconds: float
    images_per_s: float
    settings: dict[str, Any]
    facts: list[dict[str, Any]]
    """Of each seed."""
    source: NotRequired[str]
    """The images, if they are not the evaluation's."""


class FeaturesResult(TypedDict):
    """What the features are, and what they took."""

    seconds: float
    images_per_s: float
    train: int
    test: int
    width: int


class EvaluationResult(TypedDict):
    """All of it; of an evaluation that goes on, what is known by now."""

    encoder: str
    source: str
    test_source: str
    protocols: dict[str, ProtocolResult]
    label_free: dict[str, float]
    features: FeaturesResult
    classes: list[str]
    bad_images: int


def read_evaluation_result(path: Path) -> EvaluationResult | None:
    """Return what the file says, or None if it is not there or not whole."""
    return cast(EvaluationResult | None, read_json(path))


def write_evaluation_result(path: Path, result: EvaluationResult) -> None:
    """Write the file anew."""
    write_json(path, result)
