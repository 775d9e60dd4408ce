"""Where MLflow's records go."""

import os
import shlex
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


def compare_line(configured: str | None, *, folder: Path) -> str:
    """Return what shows the runs beside each other: a command, or the address of a server.

    A password is not printed: an address that stands in the environment is named by its variable.

    Args:
        configured: ``track.tracking_uri``.
        folder: The working directory.
    """
    uri = tracking_uri(configured, folder=folder)
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if urlsplit(uri).password is not None and not configured:
        return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    return shlex.join(["mlflow", "ui", "--backend-store-uri", without_password(uri)])


def is_file_store(uri: str) -> bool:
    """Return whether a tracking URI is a folder of files (``mlruns``), which MLflow 3 refuses."""
    return urlsplit(uri).scheme in ("", "file") and uri != "databricks"
