"""The settings of a run's name, folder and tracking."""

import re
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from raysl.config.base import Config, Idle
from raysl.errors import hide_passwords
from raysl.folder.address import check_output_dir

OutputDir = Annotated[str, AfterValidator(check_output_dir)]
"""Parent of run folders: a path, or an address of a store without a password."""

_Named = Annotated[str, Field(min_length=1)]
_LONGEST_NAME = 200  # file systems take 255 bytes, and others are added behind it


class TrackConfig(Config):
    """How the run is tracked in MLflow."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("registered_model",), {"log_model": (False,)}),)
    mlflow: bool = True
    """Track the run in MLflow."""
    tracking_uri: _Named | None = None
    """URI of the MLflow server or store; null uses MLFLOW_TRACKING_URI, else a SQLite file in the
    working directory."""
    experiment: _Named = "raysl"
    """Name of the experiment in MLflow; it is created if it does not exist."""
    log_model: bool = True
    """Store the encoder as an MLflow model with its signature."""
    registered_model: _Named | None = None
    """Name of a registered model in MLflow; the encoder becomes its newest version. null does not
    register the encoder."""

    @model_serializer(mode="wrap")
    def _without_password(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the password out of everything that is written, such as config.yaml and MLflow."""
        values: dict[str, Any] = serialize(self)
        if values.get("tracking_uri"):
            values["tracking_uri"] = hide_passwords(values["tracking_uri"])
        return values


def check_run_name(name: str) -> str:
    """Return the name of a run or a sweep; raise ValueError if it is not a valid name."""
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a name has at most {_LONGEST_NAME} characters; got {len(name):,}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=-]*", name):
        raise ValueError(
            f"a name starts with a letter or digit and holds letters, digits, '.', '_', '=' "
            f"and '-'; got {name!r}"
        )
    return name
