"""``mlflow.json``: which MLflow run a folder has, and what MLflow has of it. Loads no MLflow."""

from pathlib import Path
from typing import NamedTuple

from raysl.folder.whole import read_json, write_json

_HIDDEN = ":***@"


class TrackedRun(NamedTuple):
    """Of a run, a sweep or a pipeline."""

    run_id: str | None
    uri: str | None
    """MLflow's address, without a password."""
    experiment: str | None
    sent: dict[str, int] | None
    """Metric to the last step that MLflow has; None is not known."""

    @property
    def whole_uri(self) -> str | None:
        """The address, unless it had a password: whoever knows that knows the address too."""
        return None if self.uri is None or _HIDDEN in self.uri else self.uri


def read_tracked_run(path: Path) -> TrackedRun | None:
    """Return what is kept, or None if MLflow never had a run of this folder."""
    kept = read_json(path) or {}
    if not kept.get("run_id"):
        return None
    return TrackedRun(kept["run_id"], kept.get("uri"), kept.get("experiment"), kept.get("sent"))


def write_tracked_run(path: Path, tracked: TrackedRun) -> None:
    """Keep it for the next start."""
    write_json(path, tracked._asdict())


class TrackedEvaluation(NamedTuple):
    """Of an evaluation, which is told to the run that trained the encoder, if there is one."""

    run_id: str
    uri: str | None
    """MLflow's address, without a password."""
    what: str | None
    """A digest of the numbers that were sent, and of where to."""


def read_tracked_evaluation(path: Path) -> TrackedEvaluation | None:
    """Return what is kept, or None if MLflow never had this evaluation."""
    kept = read_json(path) or {}
    if not kept.get("run_id"):
        return None
    return TrackedEvaluation(kept["run_id"], kept.get("uri"), kept.get("what"))


def write_tracked_evaluation(path: Path, tracked: TrackedEvaluation) -> None:
    """Keep it for the next evaluation of the same encoder."""
    write_json(path, tracked._asdict())
