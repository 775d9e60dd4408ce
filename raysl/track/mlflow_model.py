"""Store encoders as MLflow models: log, load, and register versions."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlflow
import mlflow.pytorch
import numpy as np
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from raysl.errors import ExportError, RayslError
from raysl.track.mlflow_problem import problem_of
from raysl.track.mlflow_tracker import experiment_id, patient_client
from raysl.track.uri import without_password

_URI_VARIABLE = "MLFLOW_TRACKING_URI"


class Registered(NamedTuple):
    """A version of a registered model."""

    name: str
    version: str
    run_id: str
    difference: float
    """Largest difference between the outputs of the loaded model and of the encoder."""


def log_encoder(
    encoder: Any,
    *,
    uri: str,
    run_id: str | None,
    size_px: int,
    embed_dim: int,
    packages: list[str],
    registered_as: str | None = None,
) -> str:
    """Store an encoder as a model of an MLflow run, with its signature.

    Args:
        encoder: A torch module, ``(N, 3, S, S)`` float32 -> ``(N, embed_dim)`` float32.
        uri: MLflow tracking URI.
        run_id: The MLflow run to log the model to.
        size_px: Side S of the images in px.
        embed_dim: Width of the features.
        packages: Requirements for loading the model, such as ``torch==2.15.0``.
        registered_as: Name of a registered model, which gets this model as its newest version.

    Returns:
        The URI of the model in MLflow.
    """
    shape = (-1, 3, size_px, size_px)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, embed_dim))]),
    )
    with use_tracking_uri(uri), mlflow.start_run(run_id=run_id):
        info = mlflow.pytorch.log_model(
            encoder,
            name="encoder",
            signature=signature,
            input_example=np.zeros((2, *shape[1:]), dtype=np.float32),
            pip_requirements=packages,
            registered_model_name=registered_as,
        )
    return str(info.model_uri)


def register_encoder(
    encoder: Any,
    *,
    uri: str,
    name: str,
    run_id: str | None,
    experiment: str,
    size_px: int,
    embed_dim: int,
    packages: list[str],
    check: Callable[[Any], float],
) -> Registered:
    """Register an encoder as the newest version of a model, after loading and checking it.

    Args:
        encoder: A torch module, as for :func:`log_encoder`.
        uri: MLflow tracking URI.
        name: Name of the registered model; it is created if it does not exist.
        run_id: Id of the MLflow run that trained the encoder; if it is None or no longer exists, a
            new run is created.
        experiment: Experiment of a new run.
        size_px: Side of the images in px.
        embed_dim: Width of the features.
        packages: Requirements for loading the model, such as ``torch==2.15.0``.
        check: Compares the loaded model with the encoder; returns the largest difference, or raises
            if it is too large.

    Raises:
        ExportError: If MLflow does not accept the model, or the check fails.
    """
    try:
        client = patient_client(uri)
        run = run_id if _is_active(client, run_id) else _new_run(client, experiment, name)
        assert run is not None
        model_uri = log_encoder(
            encoder, uri=uri, run_id=run, size_px=size_px, embed_dim=embed_dim, packages=packages
        )
        with use_tracking_uri(uri):
            difference = check(mlflow.pytorch.load_model(model_uri, map_location="cpu"))
            version = mlflow.register_model(model_uri, name)
    except RayslError:
        raise
    except Exception as error:  # stores and MLflow's exporter may raise anything
        text, cure = problem_of(error, uri=uri, experiment=experiment)
        raise ExportError(
            f"{without_password(uri)}: MLflow did not accept the model: {text}"
            + ("" if cure is None else f"; {cure}")
        ) from None
    return Registered(name, str(version.version), run, difference)


def _is_active(client: MlflowClient, run_id: str | None) -> bool:
    if run_id is None:
        return False
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage != LifecycleStage.DELETED)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _new_run(client: MlflowClient, experiment: str, name: str) -> str:
    run = client.create_run(
        experiment_id(client, experiment),
        start_time=int(time.time() * 1000),
        run_name=f"export of {name}",
    )
    return str(run.info.run_id)


@contextmanager
def use_tracking_uri(uri: str) -> Iterator[None]:
    """Set MLflow's global tracking URI in a ``with`` block, and restore the previous one.

    MLflow also sets an environment variable, which the next run in this process would read.
    """
    previous_uri = os.environ.get(_URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(previous_uri or "")
        os.environ.pop(_URI_VARIABLE, None)
        if previous_uri is not None:
            os.environ[_URI_VARIABLE] = previous_uri
