"""Read back an evaluation from its folder: results, features, predictions, images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import cv2
import numpy as np
import numpy.typing as npt

from raysl.downstream.evaluation_record import (
    EvaluationResult,
    ProtocolResult,
    read_evaluation_result,
)
from raysl.errors import DataError
from raysl.evaluate.features import EvalImages
from raysl.sources.source import Labels

RECORD = "evaluation.json"
ARRAYS = "evaluation.npz"

_PREDICTIONS = "predictions_"


class Part(NamedTuple):
    """The training or the test images of an evaluation."""

    features: npt.NDArray[np.float32]
    """``(M, D)``."""
    labels: Labels
    """``(M,)`` class numbers, -1 without a label."""
    images: EvalImages
    """Row i of the features belongs to image i."""

    @property
    def is_labelled(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels >= 0).any())

    def subset(self, most: int, *, seed: int = 0) -> npt.NDArray[np.int64]:
        """Return at most ``most`` indices with finite features, in a fixed random order."""
        finite = np.flatnonzero(np.isfinite(self.features).all(axis=1))
        return np.random.default_rng(seed).permutation(finite)[:most]

    def thumbnails(self, indices: npt.NDArray[np.int64], *, most_px: int) -> npt.NDArray[np.uint8]:
        """Return the encoder's input at these indices, downscaled, ``(B, S, S, 3)`` uint8."""
        side = min(self.images.size_px, most_px)
        shrunk = [
            cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
            for batch in self.images.batches(indices)
            for image in batch
        ]
        return np.stack(shrunk).astype(np.uint8) if shrunk else np.zeros((0, side, side, 3), "u1")


class Evaluation(NamedTuple):
    """The files of an evaluation."""

    record: EvaluationResult
    """``evaluation.json``."""
    train: Part
    test: Part
    predictions: Mapping[str, Labels]
    """For each protocol, the predicted class numbers ``(N,)`` of the test images."""
    class_names: list[str]

    @property
    def protocols(self) -> Mapping[str, ProtocolResult]:
        """The results of each protocol, by name."""
        protocols = self.record.get("protocols")
        return protocols if isinstance(protocols, Mapping) else {}

    def name_of(self, label: int) -> str:
        """Return the name of a class, or ``class NUMBER`` if it has none."""
        has_name = 0 <= label < len(self.class_names)
        return str(self.class_names[label]) if has_name else f"class {label}"


def read_evaluation(folder: Path, *, train: EvalImages, test: EvalImages) -> Evaluation:
    """Read ``evaluation.json`` and ``evaluation.npz``.

    Args:
        folder: Folder of the evaluation.
        train: Labelled training images; the file names the rows that were used.
        test: Test images; the file names the rows that were used.

    Raises:
        DataError: If a file is missing or damaged, or the two do not match.
    """
    record = read_evaluation_result(folder / RECORD)
    if record is None:
        raise DataError(f"{folder / RECORD}: missing or damaged; raysl evaluate writes it")
    path = folder / ARRAYS
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        parts = [_part(arrays, name, images) for name, images in (("train", train), ("test", test))]
    except FileNotFoundError:
        raise DataError(f"{path}: missing; raysl evaluate writes it") from None
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: damaged: {error}") from None
    predictions = {
        name.removeprefix(_PREDICTIONS): values
        for name, values in arrays.items()
        if name.startswith(_PREDICTIONS)
    }
    for name, values in predictions.items():
        if values.shape != parts[1].labels.shape:
            raise DataError(
                f"{path}: predictions_{name} is {values.shape} for {len(parts[1].labels)} images"
            )
    names = [str(name) for name in record.get("classes") or []]
    return Evaluation(record, parts[0], parts[1], predictions, names)


def _part(arrays: Mapping[str, npt.NDArray[Any]], name: str, images: EvalImages) -> Part:
    features, labels, rows = (arrays[f"{name}_{what}"] for what in ("features", "labels", "rows"))
    if features.ndim != 2 or not len(features) == len(labels) == len(rows):
        shapes = features.shape, labels.shape, rows.shape
        raise ValueError(f"{name} has features, labels and rows of shapes {shapes}")
    used = EvalImages(
        images.source,
        rows.astype(np.int64),
        labels.astype(np.int64),
        size_px=images.size_px,
        crop_fraction=images.crop_fraction,
        num_threads=images.num_threads,
    )
    return Part(features.astype(np.float32, copy=False), used.labels, used)
