"""Where MLflow's records go."""

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit


def tracking_uri(configured: str | None, *, folder: Path) -> str:
    """Return where MLflow's records go: as configured, MLFLOW_TRACKING_URI, or SQLite in a folder.

    Args:
        configured: ``track.tracking_uri``.
        folder: The working directory; the URI is absolute, since others run elsewhere.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    return uri or f"sqlite:///{folder.absolute() / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """Return a URI that may be printed."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{host}"))
