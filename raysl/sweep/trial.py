"""Read and write the folders of a sweep and of its trials, which are the only record.

Population based training changes settings in flight. A trial's results are reported with the
settings that trained its weights, not with those drawn for it initially, nor with new settings that
have not trained a step yet.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from raysl.config.load import read_mapping, validate
from raysl.config.yaml_text import to_yaml
from raysl.errors import RunFolderError
from raysl.folder.claim import ANOTHER_NAME, changes, refusal
from raysl.folder.lock import lock_folder
from raysl.folder.shared import Copied, SharedFolder
from raysl.folder.whole import read_json, write_json, write_text
from raysl.run.environment import flatten_mapping
from raysl.run.held import Kind
from raysl.sources.place import as_place
from raysl.sweep.config import IF_CHANGED, MetricConfig, SweepConfig
from raysl.sweep.space import TRIALS, Candidate, trial_name
from raysl.track.mlflow_record import read_tracked_run
from raysl.track.results import new_name
from raysl.track.run_folder import RunFolder, read_metrics

Status = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")
"""Final states of a trial."""

# Sections that may change from one start of a sweep to the next.
_MAY_CHANGE = ("budget", "resources", "retries", "track", "output_dir", "metric")


class Trial(NamedTuple):
    """The state of one trial, read from its folder."""

    number: int
    params: dict[str, Any]
    """Setting (or ``config``, ``seed``) to its displayed value. With population based training, the
    settings that trained the last measured weights."""
    status: Status
    """``running`` means started and not ended, whether or not a process is working on it."""
    curve: tuple[tuple[float, float], ...]
    """(epoch, metric) wherever the metric was measured and is finite."""
    metric: float | None
    """The last value of the curve."""
    also: dict[str, float]
    """The last finite values of the metric's ``also`` keys."""
    epoch: float
    """The last epoch reached."""
    seconds: float
    """Seconds of training, without start, evaluation and pauses."""
    error: str | None
    """The reason if the trial failed, else None."""
    path: Path
    """Its run folder."""
    mlflow_run_id: str | None


_OF_DRIVER = ("config.yaml", "trial.json", "source.json", "mlflow.json", "told.json", "times.jsonl")
_OF_TRIAL = ("metrics.jsonl", "results.json", "error.json", "changes.json")


def _is_of_trial(name: str, files: tuple[str, ...]) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == TRIALS and parts[2] in files


SWEEP = Kind(
    "sweep",
    restored=lambda name: (
        ("/" not in name and not name.endswith(".lock"))  # of Optuna's journal
        or name.startswith("pictures/")
        or _is_of_trial(name, (*_OF_DRIVER, *_OF_TRIAL))
    ),
    of_others=lambda name: _is_of_trial(name, _OF_TRIAL),
)
"""What a sweep's driver needs of its folder in a store. Each trial writes its own run folder."""


class SweepFolder(SharedFolder):
    """The paths in ``OUTPUT_DIR/NAME``.

    Args:
        path: The folder.
        stored: The folder's copy in a store; None if it is on a disk that all nodes share.
    """

    def __init__(self, path: Path, *, stored: Copied | None = None) -> None:
        super().__init__(path, stored=stored)
        self.config = self.path / "sweep.yaml"
        self.trials = self.path / TRIALS
        self.mlflow = self.path / "mlflow.json"
        self.summary = self.path / "summary.json"
        self.best = self.path / "best.yaml"
        self.report = self.path / "report.html"
        self.pictures = self.path / "pictures"
        self.optuna = self.path / "optuna.log"

    def trial(self, number: int) -> RunFolder:
        """Return the run folder of a trial, as the driver sees it."""
        return RunFolder(self.trials / trial_name(number))

    def fetch_trial(self, number: int) -> None:
        """Get what a trial has written.

        Raises:
            RunFolderError: If the store fails for longer than a minute.
        """
        self.fetch(f"{TRIALS}/{trial_name(number)}")

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder for one process; the lock ends with the process.

        Raises:
            RunFolderError: On entering, if another process holds it, or it cannot be created.
        """
        instead = "give this sweep another name=..."
        return lock_folder(self.path, doing="is training in", instead=instead)


def claim(folder: SweepFolder, sweep: SweepConfig) -> None:
    """Write the configuration into the folder, which is new or belongs to the same sweep.

    Raises:
        RunFolderError: If the folder holds another sweep.
    """
    values = sweep.model_dump(mode="json")
    if folder.config.exists():
        # Validation gives settings that are newer than the folder their defaults.
        earlier = validate(SweepConfig, read_mapping(folder.config), where=str(folder.config))
        old, new = (_comparable(each) for each in (earlier.model_dump(mode="json"), values))
        keys = [key for key in sorted({*old, *new}) if key.split(".")[0] not in _MAY_CHANGE]
        changed = changes(old, new, keys=keys)
        if changed:
            text = refusal(folder.shown(), "holds another sweep", changed, instead=ANOTHER_NAME)
            raise RunFolderError(text)
    write_text(folder.config, to_yaml(values))


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings with names of base files and absolute paths of images.

    Folders of base files are left out, since each job has another working folder.
    """
    settings = flatten_mapping({**values, "base": [Path(base).name for base in values["base"]]})
    settings.pop(f"set.{IF_CHANGED}", None)  # may change
    return {key: as_place(key.rpartition(".")[2], value) for key, value in settings.items()}


def trial_file(folder: RunFolder) -> Path:
    """Return the file of a trial's candidate and, unless it finished, its outcome."""
    return folder.path / "trial.json"


def write_trial(
    folder: RunFolder,
    candidate: Candidate,
    *,
    status: Literal["stopped", "failed"] | None = None,
    error: str | None = None,
) -> None:
    """Write a trial's candidate and status; only the driver does, so there is a single writer.

    Args:
        folder: The trial's run folder; created if missing.
        candidate: The candidate.
        status: How it ended without finishing; None while it may continue. Whether it waits, runs
            or has finished follows from other files of its folder.
        error: The reason if it failed, else None.
    """
    ended = {key: value for key, value in (("status", status), ("error", error)) if value}
    write_json(trial_file(folder), candidate._asdict() | ended)


def read_candidate(folder: RunFolder) -> Candidate | None:
    """Return the candidate of a trial's folder; None if the folder is no trial's.

    Raises:
        RunFolderError: If another version of raysl wrote the file.
    """
    stored = read_json(trial_file(folder))
    if stored is None:
        return None
    missing = sorted(set(Candidate._fields) - set(stored))
    if missing:
        raise RunFolderError(
            f"{trial_file(folder)}: no {', '.join(missing)}; another version of raysl wrote it. "
            f"Give the sweep another name=..."
        )
    return Candidate(**{field: stored[field] for field in Candidate._fields})


def read_trial(folder: RunFolder, metric: MetricConfig) -> Trial | None:
    """Read a trial from its folder; None if the folder is no trial's.

    Raises:
        RunFolderError: If another version of raysl wrote ``trial.json``.
    """
    candidate = read_candidate(folder)
    if candidate is None:
        return None
    stored = read_json(trial_file(folder)) or {}
    tracked = read_tracked_run(folder.mlflow)
    records = _read_metrics(folder, metric)
    curve = _curve(records, metric.name)
    also = {name: [value for _, value in _curve(records, name)] for name in metric.also}
    epochs = [epoch for epoch, _ in _curve(records, "train/epoch")]
    change = change_before(folder, last_measured(folder, metric))
    status: Status = stored.get("status") or ("running" if records else "waiting")
    if folder.results.exists():
        status = "finished"
    return Trial(
        number=candidate.number,
        params=candidate.params | ({} if change is None else change.params),
        status=status,
        curve=curve,
        metric=curve[-1][1] if curve else None,
        also={name: values[-1] for name, values in also.items() if values},
        epoch=max(epochs, default=0.0),
        seconds=sum(value for _, value in _curve(records, "time/train_s")),
        error=stored.get("error") if status == "failed" else None,
        path=folder.path,
        mlflow_run_id=None if tracked is None else tracked.run_id,
    )


def last_measured(folder: RunFolder, metric: MetricConfig) -> int:
    """Return the last step at which a trial was measured; 0 if it never was."""
    return max((r["step"] for r in _read_metrics(folder, metric) if metric.name in r), default=0)


def _read_metrics(folder: RunFolder, metric: MetricConfig) -> list[dict[str, Any]]:
    """Read a trial's metrics; rename those of earlier versions if the sweep uses the new names."""
    records = read_metrics(folder.metrics)
    if not any("linear_lbfgs" in name for name in (metric.name, *metric.also)):
        return records
    return [
        record
        if any("linear_lbfgs" in key for key in record)
        else {new_name(key): value for key, value in record.items()}
        for record in records
    ]


def read_trials(folder: SweepFolder, metric: MetricConfig) -> list[Trial]:
    """Read all trials of a sweep, in the order of their numbers."""
    if not folder.trials.is_dir():
        return []
    read = (read_trial(RunFolder(path), metric) for path in folder.trials.iterdir())
    return sorted((trial for trial in read if trial is not None), key=lambda trial: trial.number)


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[float, float], ...]:
    """Return the (epoch, value) of a metric where it is finite.

    A line written by evaluation alone has no epoch; it is derived from the step and another line
    that has both.
    """
    with_epoch = [r for r in records if r.get("train/epoch", 0.0) > 0]
    if not with_epoch:
        return ()
    epochs_per_step = with_epoch[-1]["train/epoch"] / with_epoch[-1]["step"]
    return tuple(
        (record.get("train/epoch", record["step"] * epochs_per_step), float(record[name]))
        for record in records
        if math.isfinite(record.get(name, math.nan))
    )


class Change(NamedTuple):
    """Settings that apply from a step on."""

    after_step: int
    """They apply to all steps after this one."""
    params: dict[str, Any]
    """Dotted settings and their displayed values."""
    values: dict[str, Any]
    """Dotted settings and their values."""


def write_change(folder: RunFolder, change: Change) -> None:
    """Record the settings that a trial trains with from here on; later records are dropped."""
    stored = [each for each in _read_changes(folder) if each.after_step < change.after_step]
    if not stored or stored[-1].params != change.params:
        stored.append(change)
    write_json(folder.path / "changes.json", {"changes": [each._asdict() for each in stored]})


def newest_change(folder: RunFolder) -> Change | None:
    """Return the settings that a trial continues with; None if they are those drawn for it."""
    return next(reversed(_read_changes(folder)), None)


def change_before(folder: RunFolder, step: int) -> Change | None:
    """Return the settings that trained a step; None if they are those drawn for the trial."""
    return next((each for each in reversed(_read_changes(folder)) if each.after_step < step), None)


def _read_changes(folder: RunFolder) -> list[Change]:
    stored = read_json(folder.path / "changes.json") or {}
    return [Change(**each) for each in stored.get("changes", ())]
