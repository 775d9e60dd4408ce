"""Find, create and end the runs of an MLflow store, so that each piece of work has one run.

A server may create a run and its answer be lost, and MLflow's client repeats a lost request by
itself. Each run therefore has a random key as a tag from its creation on, by which it is found.
"""

import time

from mlflow.entities import LifecycleStage, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from raysl.track.mlflow_problem import DeletedExperimentError

KEY = "raysl.key"
"""Tag of a run with the key that raysl finds it by."""

_AT_MOST = 20  # runs with one key: a second one is rare


def experiment_id(client: MlflowClient, name: str) -> str:
    """Return the id of an experiment, after creating it if it does not exist.

    Raises:
        DeletedExperimentError: If it was deleted: MLflow does not free its name.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # created by another run meanwhile
            if experiment is None:
                raise
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise DeletedExperimentError(name, str(experiment.experiment_id))
    return str(experiment.experiment_id)


def active_run(client: MlflowClient, run_id: str) -> Run | None:
    """Return a run, or None if it was deleted or the store never had it."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if run.info.lifecycle_stage == LifecycleStage.DELETED else run


def open_run(client: MlflowClient, experiment: str, *, key: str, run_name: str) -> Run:
    """Return the run with a key; create it if the experiment has none.

    Args:
        client: The store.
        experiment: Name of the experiment; it is created if it does not exist.
        key: Random key of the run, the same at every try.
        run_name: Name of a new run.

    Raises:
        DeletedExperimentError: If the experiment was deleted.
        MlflowException: If the store does not answer or refuses; stores may raise other errors.
    """
    where = experiment_id(client, experiment)
    found = _runs_with(client, where, key)
    if not found:
        now = int(time.time() * 1000)
        try:
            created = client.create_run(where, start_time=now, run_name=run_name, tags={KEY: key})
        except Exception:
            found = _runs_with(client, where, key)  # the answer may be lost and the run be there
            if not found:
                raise
        else:  # the client may have repeated the request; a search may not show the newest run yet
            found = _runs_with(client, where, key) or [created]
    kept, *doubles = found
    _drop(client, doubles)
    return kept


def drop_doubles(client: MlflowClient, where: str, kept: str, *, key: str) -> None:
    """Delete other runs with the key of a run: requests that the server answered too late.

    Args:
        client: The store.
        where: Id of the run's experiment.
        kept: Id of the run.
        key: Key of the run.
    """
    _drop(client, [run for run in _runs_with(client, where, key) if run.info.run_id != kept])


def _drop(client: MlflowClient, doubles: list[Run]) -> None:
    for run in doubles:
        if run.data.metrics:  # not from a lost answer
            continue
        try:
            client.delete_run(run.info.run_id)
        except MlflowException:  # some servers let only the owner of an experiment delete
            client.set_terminated(run.info.run_id, status="KILLED")


def _runs_with(client: MlflowClient, where: str, key: str) -> list[Run]:
    """Return the runs with a key that are not deleted, the first one created first."""
    found = client.search_runs(
        [where],
        filter_string=f"tags.`{KEY}` = '{key}'",
        run_view_type=ViewType.ACTIVE_ONLY,
        max_results=_AT_MOST,
    )
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
