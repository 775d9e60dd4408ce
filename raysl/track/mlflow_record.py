"""Read and write ``mlflow.json``: the MLflow run of a folder, and what was sent to it."""

from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from raysl.folder.whole import read_json, write_json

_HIDDEN = ":***@"


class TrackedRun(NamedTuple):
    """The MLflow run that tracks a run, a sweep or a pipeline."""

    run_id: str | None
    uri: str | None
    """MLflow tracking URI without a password."""
    experiment: str | None
    sent: dict[str, int] | None
    """Last step of each metric that was sent to MLflow; None if unknown."""

    @property
    def whole_uri(self) -> str | None:
        """Return the URI, or None if a password was removed from it."""
        return None if self.uri is None or _HIDDEN in self.uri else self.uri


def read_tracked_run(path: Path) -> TrackedRun | None:
    """Return the record at a path, or None if there is no MLflow run."""
    stored = read_json(path) or {}
    if not stored.get("run_id"):
        return None
    return TrackedRun(
        stored["run_id"], stored.get("uri"), stored.get("experiment"), stored.get("sent")
    )


def write_tracked_run(path: Path, tracked: TrackedRun) -> None:
    """Write the record at a path, for the next start of the run."""
    _write_beside_key(path, tracked._asdict())


class TrackedEvaluation(NamedTuple):
    """The MLflow run that received an evaluation: that of the encoder, or one of its own."""

    run_id: str
    uri: str | None
    """MLflow tracking URI without a password."""
    what: str | None
    """Digest of the sent metrics and the URI."""


def read_tracked_evaluation(path: Path) -> TrackedEvaluation | None:
    """Return the record at a path, or None if the evaluation was never sent."""
    stored = read_json(path) or {}
    if not stored.get("run_id"):
        return None
    return TrackedEvaluation(stored["run_id"], stored.get("uri"), stored.get("what"))


def write_tracked_evaluation(path: Path, tracked: TrackedEvaluation) -> None:
    """Write the record at a path, for the next evaluation of the same encoder."""
    _write_beside_key(path, tracked._asdict())


def run_key(path: Path) -> str:
    """Return the random key of a folder's MLflow run; the first call draws and stores it.

    It is stored before the run is created, so that a run whose id was lost on the way is found.
    """
    stored = read_json(path) or {}
    key = stored.get("key")
    if not isinstance(key, str):
        key = uuid4().hex
        write_json(path, {**stored, "key": key})
    return key


def _write_beside_key(path: Path, values: dict[str, Any]) -> None:
    key = (read_json(path) or {}).get("key")
    write_json(path, values if key is None else {**values, "key": key})
