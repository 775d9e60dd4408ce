"""Send an evaluation's results to the MLflow run of the training of its encoder."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow.entities import Metric, RunTag

from raysl.track.mlflow_runs import active_run, open_run
from raysl.track.mlflow_tracker import patient_client


class EvaluationRecord(NamedTuple):
    """The results of an evaluation to send to MLflow."""

    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    artifacts: Sequence[Path]
    """Files to send; missing ones are skipped."""
    root: Path
    """Folder above the artifacts; they keep their paths relative to it."""
    place: str
    """Folder in the MLflow run for the artifacts."""


def send_evaluation(
    record: EvaluationRecord,
    *,
    uri: str,
    run_id: str | None,
    experiment: str,
    run_name: str,
    key: str,
) -> str:
    """Send an evaluation to an MLflow run, which may have ended, or to a new one.

    Args:
        record: Metrics, tags and artifacts to send.
        uri: MLflow tracking URI.
        run_id: Id of the MLflow run; if it is None or was deleted, a new run is created.
        experiment: Experiment of a new run.
        run_name: Name of a new run.
        key: Random key of a new run, the same at every try, see ``run_key``.

    Returns:
        Id of the MLflow run that received the evaluation.

    Raises:
        MlflowException: If the server does not answer or refuses; stores may raise other errors.
    """
    client = patient_client(uri)
    if run_id is None or active_run(client, run_id) is None:
        run_id = str(open_run(client, experiment, key=key, run_name=run_name).info.run_id)
        client.set_terminated(run_id, status="FINISHED")
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, now, 0) for name, value in record.metrics.items()],
        tags=[RunTag(name, value) for name, value in record.tags.items()],
    )
    for path in record.artifacts:
        if path.exists():
            relative = path.parent.relative_to(record.root).as_posix()
            where = record.place if relative == "." else f"{record.place}/{relative}"
            client.log_artifact(run_id, str(path), where)
    return run_id
