"""The folder of an evaluation: its identity, and its finished measurements."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from raysl.errors import RunFolderError
from raysl.folder.claim import changes, refusal
from raysl.folder.lock import lock_folder
from raysl.folder.whole import appears_whole, read_json, write_json

Arrays = dict[str, npt.NDArray[Any]]

_PREDICTIONS = "predictions_"


class EvaluationFolder:
    """``RUN/evaluations/NAME``: the paths in it.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.record = self.path / "evaluation.json"
        self.arrays = self.path / "evaluation.npz"
        self.about = self.path / "features.json"
        self.units = self.path / "units"
        self.runs = self.path / "runs"
        self.report = self.path / "report.html"
        self.pictures = self.path / "pictures"
        self.mlflow = self.path / "mlflow.json"

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder for one process; the lock goes with the process, however it ends.

        Raises:
            RunFolderError: On entering, if another process holds it, or it cannot be made.
        """
        instead = "give this evaluation another name=..."
        return lock_folder(self.path, doing="is evaluating in", instead=instead)

    def claim(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is known of the features if they are there; refuse those of something else.

        Args:
            identity: Names all that the features depend on.

        Raises:
            RunFolderError: If the folder holds features of another encoder or of other images.
        """
        about = read_json(self.about)
        if about is None:
            return None
        changed = changes(about["identity"], identity, keys=identity)
        if changed:
            holds = "holds an evaluation of something else"
            raise RunFolderError(refusal(self.path, holds, changed))
        return about if self.arrays.exists() else None

    def read_arrays(self) -> Arrays | None:
        """Return the arrays, or None if they are not there or not whole."""
        try:
            with np.load(self.arrays, allow_pickle=False) as kept:
                return {name: kept[name] for name in kept.files}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def write_features(self, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Keep features, labels and rows, and what they are of."""
        _save(self.arrays, arrays)
        write_json(self.about, about)

    def write_predictions(self, found: Mapping[str, npt.NDArray[np.int64]]) -> None:
        """Put predictions beside the features; the file is written anew only if one changed."""
        arrays = self.read_arrays() or {}
        old = {name: values for name, values in arrays.items() if name.startswith(_PREDICTIONS)}
        new = {_PREDICTIONS + name: values for name, values in found.items()}
        same = old.keys() == new.keys() and all(np.array_equal(old[n], new[n]) for n in new)
        if not same:
            _save(self.arrays, {n: v for n, v in arrays.items() if n not in old} | new)

    def read_unit(self, key: str) -> tuple[dict[str, Any], npt.NDArray[np.int64] | None] | None:
        """Return what a protocol gave for a seed, if it has been measured with these settings."""
        kept = read_json(self.units / f"{key}.json")
        if kept is None:
            return None
        try:
            predictions = np.load(self.units / f"{key}.npy", allow_pickle=False)
        except (OSError, ValueError):
            return (kept, None) if not kept.get("has_predictions") else None
        return kept, predictions

    def write_unit(
        self, key: str, values: Mapping[str, Any], predictions: npt.NDArray[np.int64] | None
    ) -> None:
        """Keep what a protocol gave for a seed."""
        if predictions is not None:
            with appears_whole(self.units / f"{key}.npy") as temporary:
                np.save(temporary, predictions)
        kept = dict(values) | {"has_predictions": predictions is not None}
        write_json(self.units / f"{key}.json", json.loads(json.dumps(kept)))


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    with appears_whole(path) as temporary:
        np.savez(temporary, **arrays)
