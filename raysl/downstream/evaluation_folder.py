"""The folder of an evaluation: its identity, and its finished measurements."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from raysl.errors import RunFolderError
from raysl.folder.claim import changes, refusal
from raysl.folder.lock import lock_folder
from raysl.folder.shared import Copied, SharedFolder
from raysl.folder.whole import appears_whole, read_json, write_json
from raysl.run.held import Kind

Arrays = dict[str, npt.NDArray[Any]]

_PREDICTIONS = "predictions_"


class StoredUnit(NamedTuple):
    """The stored result of a unit: one seed of a protocol."""

    values: dict[str, Any]
    """Accuracy, seconds and facts."""
    predictions: npt.NDArray[np.int64] | None
    """``(N,)`` predicted class numbers; None if the protocol returns none."""


RUNS = "runs"
EVALUATION = Kind("evaluation", restored=lambda name: not name.startswith(f"{RUNS}/"))
"""What an evaluation needs of its folder in a store. Each training writes its own run folder."""


class EvaluationFolder(SharedFolder):
    """The paths of an evaluation in ``RUN/evaluations/NAME``, and its files.

    Args:
        path: The folder.
        stored: The folder's copy in a store; None if it is on a disk that all nodes share.
    """

    def __init__(self, path: Path, *, stored: Copied | None = None) -> None:
        super().__init__(path, stored=stored)
        self.record = self.path / "evaluation.json"
        self.arrays = self.path / "evaluation.npz"
        self.feature_info = self.path / "features.json"
        self.units = self.path / "units"
        self.runs = self.path / RUNS
        self.report = self.path / "report.html"
        self.pictures = self.path / "pictures"
        self.mlflow = self.path / "mlflow.json"

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder for this process; the lock ends with the process, however it ends.

        Raises:
            RunFolderError: On entering, if another process has the lock, or the folder cannot be
                created.
        """
        instead = "give this evaluation another name=..."
        return lock_folder(self.path, doing="is evaluating in", instead=instead)

    def claim(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the facts about stored features, or None if there are none.

        Args:
            identity: All values that the features depend on.

        Raises:
            RunFolderError: If the folder contains features with another identity.
        """
        feature_info = read_json(self.feature_info)
        if feature_info is None:
            return None
        changed = changes(feature_info["identity"], identity, keys=identity)
        if changed:
            holds = "contains another evaluation"
            raise RunFolderError(refusal(self.shown(), holds, changed))
        return feature_info if self.arrays.exists() else None

    def read_arrays(self) -> Arrays | None:
        """Return the arrays, or None if the file is missing or damaged."""
        try:
            with np.load(self.arrays, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def write_features(self, arrays: Mapping[str, Any], feature_info: Mapping[str, Any]) -> None:
        """Write features, labels and rows, and the facts about them."""
        _save(self.arrays, arrays)
        write_json(self.feature_info, feature_info)

    def write_predictions(self, predictions: Mapping[str, npt.NDArray[np.int64]]) -> None:
        """Add predictions to the file of features; it is rewritten only if a prediction changed."""
        arrays = self.read_arrays() or {}
        old = {name: values for name, values in arrays.items() if name.startswith(_PREDICTIONS)}
        new = {_PREDICTIONS + name: values for name, values in predictions.items()}
        same = old.keys() == new.keys() and all(np.array_equal(old[n], new[n]) for n in new)
        if not same:
            _save(self.arrays, {n: v for n, v in arrays.items() if n not in old} | new)

    def read_unit(self, key: str) -> StoredUnit | None:
        """Return the result of a unit, or None if it is not stored completely."""
        values = read_json(self.units / f"{key}.json")
        if values is None:
            return None
        try:
            predictions = np.load(self.units / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError):
            return StoredUnit(values, None) if not values.get("has_predictions") else None
        return StoredUnit(values, predictions)

    def write_unit(
        self, key: str, values: Mapping[str, Any], predictions: npt.NDArray[np.int64] | None
    ) -> None:
        """Write the result of a unit."""
        if predictions is not None:
            with appears_whole(self.units / f"{key}.npy") as temporary:
                np.save(temporary, predictions)
        record = dict(values) | {"has_predictions": predictions is not None}
        write_json(self.units / f"{key}.json", json.loads(json.dumps(record)))


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    with appears_whole(path) as temporary:
        np.savez(temporary, **arrays)
