"""Store encoders as MLflow models: log, load, and register versions."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import uuid4

import mlflow
import mlflow.pytorch
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from raysl.errors import ExportError, RayslError
from raysl.track.mlflow_problem import problem_of
from raysl.track.mlflow_runs import active_run, open_run
from raysl.track.mlflow_tracker import patient_client
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
        if run_id is None or active_run(client, run_id) is None:
            run_name = f"export of {name}"
            run_id = open_run(client, experiment, key=uuid4().hex, run_name=run_name).info.run_id
        model_uri = log_encoder(
            encoder, uri=uri, run_id=run_id, size_px=size_px, embed_dim=embed_dim, packages=packages
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
    return Registered(name, str(version.version), str(run_id), difference)


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
