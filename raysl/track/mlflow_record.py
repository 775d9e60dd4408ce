"""Read and write ``mlflow.json``: the MLflow run of a folder, and what it has received."""

from pathlib import Path
from typing import NamedTuple

from raysl.folder.whole import read_json, write_json

_HIDDEN = ":***@"


class TrackedRun(NamedTuple):
    """The MLflow run of a run, a sweep or a pipeline."""

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
    """Return the record, or None if this folder has no MLflow run."""
    kept = read_json(path) or {}
    if not kept.get("run_id"):
        return None
    return TrackedRun(kept["run_id"], kept.get("uri"), kept.get("experiment"), kept.get("sent"))


def write_tracked_run(path: Path, tracked: TrackedRun) -> None:
    """Write the record for the next start."""
    write_json(path, tracked._asdict())


class TrackedEvaluation(NamedTuple):
    """The MLflow run that received an evaluation; if possible that of the encoder."""

    run_id: str
    uri: str | None
    """MLflow tracking URI without a password."""
    what: str | None
    """Digest of the sent metrics and the URI."""


def read_tracked_evaluation(path: Path) -> TrackedEvaluation | None:
    """Return the record, or None if this evaluation was never sent."""
    kept = read_json(path) or {}
    if not kept.get("run_id"):
        return None
    return TrackedEvaluation(kept["run_id"], kept.get("uri"), kept.get("what"))


def write_tracked_evaluation(path: Path, tracked: TrackedEvaluation) -> None:
    """Write the record for the next evaluation of the same encoder."""
    write_json(path, tracked._asdict())
