"""Send a sweep and its trials to MLflow from the driver."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysl.config.load import read_mapping
from raysl.folder.whole import write_json
from raysl.run.environment import flatten_mapping
from raysl.sweep.config import SweepConfig
from raysl.sweep.trial import ENDED, SweepFolder, Trial, read_candidate
from raysl.track.run_folder import RunFolder

if TYPE_CHECKING:  # MLflow takes seconds to load, and not every sweep needs it
    from raysl.track.mlflow_problem import MlflowProblem
    from raysl.track.mlflow_tracker import MlflowTracker

STATUS_IN_MLFLOW = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
"""Status of an ended trial's MLflow run."""

# File in a trial's folder that marks the trial as completely sent to MLflow.
_SENT = "told.json"


class SweepTracking:
    """Sends a sweep to MLflow: one run for the sweep, and a child run for each trial.

    Trial processes do not use MLflow; the driver reads their metrics files.

    Args:
        sweep: The sweep.
        folder: The sweep's folder.
        uri: MLflow tracking URI.
        tags: Tags of code and machine.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        folder: SweepFolder,
        *,
        uri: str,
        tags: Mapping[str, str],
    ) -> None:
        self.uri = uri
        self._sweep = sweep
        self._folder = folder
        self._tags = dict(tags)
        self._children: dict[int, MlflowTracker] = {}
        # A thread sends the files of ended trials, so that new trials do not wait for the server.
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="raysl-sweep-mlflow")
        self._parent = self._tracker(
            RunFolder(folder.path),
            sweep.name,
            params=flatten_mapping(sweep.model_dump(mode="json", exclude={"space", "set"}))
            | {f"space.{key}": str(value) for key, value in _plain_space(sweep).items()}
            | {f"set.{key}": value for key, value in sweep.set.items()},
            tags={"raysl.kind": "sweep", **self._tags},
        )
        self._parent.start()
        self._parent.wait_for_run()

    @property
    def parent_run_id(self) -> str | None:
        """Return the id of the sweep's MLflow run; None if the server has not answered yet."""
        return self._parent.run_id

    @property
    def problem(self) -> str | None:
        """Return the reason why MLflow did not accept everything, or None."""
        return self._parent.problem

    @property
    def trouble(self) -> "MlflowProblem | None":
        """Return that problem with its remedy, or None."""
        return self._parent.trouble

    def start(self, trial: Trial) -> None:
        """Start sending a trial's metrics."""
        if trial.number in self._children:
            return
        folder = RunFolder(trial.path)
        parent = self.parent_run_id
        tracker = self._tracker(
            folder,
            f"{self._sweep.name}-{trial.number:04d}",
            params=_params(trial),
            tags={
                "raysl.kind": "trial",
                "sweep": self._sweep.name,
                "trial": str(trial.number),
                **({"mlflow.parentRunId": parent} if parent else {}),
                **self._tags,
            },
        )
        tracker.start()
        self._children[trial.number] = tracker

    def end(self, trial: Trial) -> None:
        """Send the rest of a trial's metrics, its status and its files."""
        self.start(trial)  # the trial may have ended in an earlier start
        tracker = self._children.pop(trial.number)
        folder = RunFolder(trial.path)
        tags: dict[str, str] = {"status": trial.status}
        if trial.status == "stopped":
            tags["stopped_at_epoch"] = f"{trial.epoch:g}"
        if trial.error:
            tags["error"] = trial.error
        if (drawn := read_candidate(folder)) is not None:  # MLflow's parameters cannot change
            tags |= {
                f"changed.{k}": str(v) for k, v in trial.params.items() if v != drawn.params[k]
            }

        def send() -> None:
            tracker.finish(
                status=STATUS_IN_MLFLOW[trial.status],
                artifacts=[folder.config, folder.metrics, folder.results],
                log_model=None,
                tags=tags,
            )
            if tracker.problem is None:
                write_json(trial.path / _SENT, {"run_id": tracker.run_id})

        self._sender.submit(send)

    def catch_up(self, trials: list[Trial]) -> None:
        """Send the ended trials that an earlier start did not send completely."""
        for trial in trials:
            if trial.status in ENDED and not self._is_sent(trial):
                self.end(trial)

    def _tracker(
        self,
        folder: RunFolder,
        run_name: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> "MlflowTracker":
        from raysl.track.mlflow_tracker import MlflowTracker  # noqa: PLC0415 - mlflow takes seconds

        return MlflowTracker(
            folder,
            uri=self.uri,
            experiment=self._sweep.track.experiment,
            run_name=run_name,
            params=params,
            tags=tags,
        )

    def _is_sent(self, trial: Trial) -> bool:
        return (trial.path / _SENT).exists()

    def finish(self, *, status: str, artifacts: list[Path], tags: Mapping[str, str]) -> None:
        """End the sweep's MLflow run; runs of unfinished trials are continued by the next start."""
        self._sender.shutdown()
        for tracker in self._children.values():
            tracker.finish(status="KILLED", artifacts=[], log_model=None)
        self._children = {}
        self._parent.finish(status=status, artifacts=artifacts, log_model=None, tags=tags)


def _plain_space(sweep: SweepConfig) -> dict[str, Any]:
    return {
        key: dimension.model_dump(mode="json", exclude_none=True)
        for key, dimension in sweep.space.items()
    }


def _params(trial: Trial) -> dict[str, Any]:
    """Return a trial's settings as MLflow parameters, and labels as ``sweep.KEY``.

    MLflow's compare page shows the first three parameters that differ, so the trial's name and
    copies of settings are left out.
    """
    settings = flatten_mapping(read_mapping(RunFolder(trial.path).config))
    del settings["name"]
    labels = {k: v for k, v in trial.params.items() if str(settings.get(k)) != str(v)}
    return settings | {f"sweep.{key}": value for key, value in labels.items()}
