"""Send a run to MLflow from its metrics file, in a thread that training never waits for.

Everything is written to disk before it is sent to MLflow. Records for a server that is slow or down
are sent when it answers again, or by the next start of the same run.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

from raysl.track.follow import MetricsReader, Record
from raysl.track.mlflow_problem import NO_ANSWER, MlflowProblem, is_inactive, problem_of
from raysl.track.mlflow_record import TrackedRun, read_tracked_run, run_key, write_tracked_run
from raysl.track.mlflow_runs import active_run, drop_doubles, open_run
from raysl.track.run_folder import RunFolder
from raysl.track.uri import same_store, without_password

T = TypeVar("T")

_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_LONGEST_PARAM = 6000
_EVERY_S = 2.0
_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_LAST_CHANCE_S = 15.0
# Two threads that create the same new database at once would fail.
_OPENING = threading.Lock()


def patient_client(uri: str) -> MlflowClient:
    """Return a client that logs only errors and gives up after seconds; callers retry."""
    # Users need no messages about created tables and inferred versions.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # By itself, MLflow would retry for minutes; the tracker retries until the run ends.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    with _OPENING:
        return MlflowClient(uri)


def warm_up(uri: str) -> None:
    """Open a store, or create it; ignore errors, because later calls report them."""
    with contextlib.suppress(Exception):
        patient_client(uri).search_experiments(max_results=1)


class MlflowTracker:
    """Sends a run to MLflow from its own thread.

    The run's key, its id and the last step sent of each metric are stored in ``mlflow.json`` of the
    run folder, so that a resumed training continues the same MLflow run and sends no value twice.

    Args:
        folder: The run folder.
        uri: MLflow tracking URI.
        experiment: Name of the experiment; it is created if it does not exist.
        run_name: Name of the run in MLflow.
        params: The configuration, flattened to dotted names; each parameter is sent once.
        tags: Tags of the run in MLflow.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.experiment = experiment
        self.run_name = run_name
        self.params = params
        self.tags = tags
        stored = read_tracked_run(folder.mlflow)
        if stored is not None and not (
            same_store(stored.uri, uri) and stored.experiment == experiment
        ):
            stored = None
        self.run_id: str | None = None if stored is None else stored.run_id
        self.trouble: MlflowProblem | None = None
        self._reader = MetricsReader(folder.metrics, None if stored is None else stored.sent)
        self._sent: dict[str, int] = dict(self._reader.seen)
        self._waiting: list[Record] = []
        self._client: MlflowClient | None = None
        self._experiment_id = ""  # of the run; known with the client
        self._stop = threading.Event()
        self._first_try_done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raysl-mlflow", daemon=True)

    def start(self) -> None:
        """Start sending the records of the metrics file."""
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Why MLflow has not accepted everything so far; None if it has."""
        return None if self.trouble is None else self.trouble.text

    def wait_for_run(self, timeout_s: float = _LAST_CHANCE_S) -> str | None:
        """Wait until the MLflow run is created, and return its id.

        Returns None and sets ``trouble`` if the server refuses or does not answer in time.
        """
        if not self._first_try_done.wait(timeout_s):
            self.trouble = MlflowProblem(f"{NO_ANSWER} within {timeout_s:g} s", None)
        return self.run_id

    def finish(
        self,
        *,
        status: str,
        artifacts: list[Path],
        log_model: Callable[["MlflowTracker"], None] | None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Send all remaining records and end the MLflow run; set ``trouble`` if there is no answer.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            artifacts: Files to store in the run; missing ones are skipped.
            log_model: Called last, with this tracker, to store the encoder.
            tags: More tags of the run.
        """
        self._stop.set()
        self._thread.join(timeout=_LAST_CHANCE_S)
        if self._thread.is_alive():
            self.trouble = self.trouble or MlflowProblem(NO_ANSWER, None)
            return
        self._send_pending()
        self._reader.close()
        if self.problem is not None:
            return
        self._try(lambda: self._store(artifacts, log_model, tags or {}))
        # End the run even if an artifact could not be stored: MLflow would show it as running.
        self._try(lambda: self._set_ended(status))

    def _run(self) -> None:
        failures = 0
        self._send_pending()  # creates the run at once, for callers that need its id
        self._first_try_done.set()
        while True:
            stopping = self._stop.wait(_RETRY_S[min(failures, 5) - 1] if failures else _EVERY_S)
            if stopping:
                return
            self._send_pending()
            failures = failures + 1 if self.problem else 0

    def _send_pending(self) -> None:
        self._waiting += self._reader.read()
        self._try(self._send)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
            self.trouble = None
        except Exception as error:  # stores may raise anything, and training continues
            if is_inactive(error):
                self._client = None  # the run was deleted: create a new one on the next try
            self.trouble = problem_of(error, uri=self.uri, experiment=self.experiment)

    def _send(self) -> None:
        client = self._ready()
        assert self.run_id is not None
        while self._waiting:
            records: list[Record] = []
            metrics: list[Metric] = []
            for record in self._waiting:
                points = _metrics_of(record)
                if metrics and len(metrics) + len(points) > _METRICS_PER_CALL:
                    break
                records.append(record)
                metrics += points
            client.log_batch(self.run_id, metrics=metrics, tags=_tags_of(records))
            for record in records:
                self._sent.update({k: record["step"] for k in record if k not in ("step", "time")})
            del self._waiting[: len(records)]
            self._write_record()

    def _ready(self) -> MlflowClient:
        """Return the client; the first call opens the MLflow run and sends its parameters."""
        if self._client is not None:
            return self._client
        client = patient_client(self.uri)
        run = self._run_in(client)
        sent_params = set(run.data.params)
        run_id = run.info.run_id
        new = [
            Param(k, str(v)[:_LONGEST_PARAM])
            for k, v in self.params.items()
            if k not in sent_params
        ]
        for chunk in _chunks(new, _PARAMS_PER_CALL):
            client.log_batch(run_id, params=chunk)
        client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in self.tags.items()])
        self._client, self._experiment_id = client, str(run.info.experiment_id)
        return client

    def _run_in(self, client: MlflowClient) -> Run:
        """Return the MLflow run, which is marked as running: the folder's, or a new one."""
        run = None
        if self.run_id is not None:
            run = active_run(client, self.run_id)
            if run is None:  # deleted: send everything again, to a new run
                self.run_id = None
                self._reader.close()
                self._reader, self._sent = MetricsReader(self.folder.metrics), {}
                self._waiting = self._reader.read()
        if run is None:
            key = run_key(self.folder.mlflow)
            run = open_run(client, self.experiment, key=key, run_name=self.run_name)
            self.run_id = str(run.info.run_id)
            self._write_record()
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _store(
        self,
        artifacts: list[Path],
        log_model: Callable[["MlflowTracker"], None] | None,
        tags: Mapping[str, str],
    ) -> None:
        client = self._ready()
        assert self.run_id is not None
        client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for path in artifacts:
            if path.exists():
                where = path.parent.relative_to(self.folder.path).as_posix()
                client.log_artifact(self.run_id, str(path), None if where == "." else where)
        if log_model is not None:
            log_model(self)

    def _set_ended(self, status: str) -> None:
        client = self._ready()
        assert self.run_id is not None
        client.set_terminated(self.run_id, status=status)
        drop_doubles(client, self._experiment_id, self.run_id, key=run_key(self.folder.mlflow))

    def _write_record(self) -> None:
        uri = without_password(self.uri)
        tracked = TrackedRun(self.run_id, uri, self.experiment, self._sent)
        write_tracked_run(self.folder.mlflow, tracked)


def _metrics_of(record: Record) -> list[Metric]:
    """Return the finite metrics; MLflow stores infinity as 1.8e308, which flattens its charts."""
    timestamp = int(record["time"] * 1000)
    return [
        Metric(name, value, timestamp, int(record["step"]))
        for name, value in _values(record)
        if math.isfinite(value)
    ]


def _tags_of(records: list[Record]) -> list[RunTag]:
    """Return a tag for each metric with non-finite values: the last such value and its step."""
    texts = {
        name: f"{value} at step {record['step']}"
        for record in records
        for name, value in _values(record)
        if not math.isfinite(value)
    }
    return [RunTag(f"not_finite.{name}", text) for name, text in texts.items()]


def _values(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the metrics of a record that MLflow plots: all except those of time."""
    for name, value in record.items():
        # Times are part of the results; as metrics they would only fill MLflow's plots.
        if name not in ("step", "time") and not name.startswith("time/"):
            yield name, float(value)


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
