"""Resolve the URI of MLflow's tracking store."""

import os
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import SplitResult, urlsplit, urlunsplit

from raysl.errors import HIDDEN, ConfigError, hide_passwords

# mlflow/tracking/_tracking_service/utils.py and mlflow/store/db/db_types.py of MLflow 3.
_DATABASES = ("postgresql", "mysql", "sqlite", "mssql")
_DATABRICKS = ("databricks", "databricks-uc", "uc")
# Neither absolute (a fourth slash, a drive) nor special to SQLite (":memory:", "file:...").
_RELATIVE_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/|:|file:|[A-Za-z]:)(.+)")
_SCHEMES = ("file", "http", "https", *_DATABASES)


def tracking_uri(configured: str | None, *, folder: Path) -> str:
    """Return the tracking URI: as configured, else MLFLOW_TRACKING_URI, else a SQLite file.

    Args:
        configured: ``track.tracking_uri``.
        folder: The working directory. The path of a SQLite file becomes absolute, because other
            processes have other working directories, and because MLflow caches one database
            connection per URI, which would not follow a change of the directory.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    relative = _RELATIVE_SQLITE.fullmatch(uri)
    return f"{relative[1]}{folder.absolute()}/{relative[2]}" if relative else uri


def same_store(stored: str | None, uri: str) -> bool:
    """Return whether a URI from a run folder, stored without its password, is the same store.

    Args:
        stored: The stored URI, or None. Earlier versions stored relative paths of SQLite files;
            they are resolved against the working directory.
        uri: A result of :func:`tracking_uri`.
    """
    return bool(stored) and tracking_uri(stored, folder=Path.cwd()) == without_password(uri)


def check_tracking_uri(configured: str | None) -> None:
    """Check that MLflow supports the scheme of the URI, without connecting to it.

    Args:
        configured: ``track.tracking_uri``; None uses MLFLOW_TRACKING_URI, if that is set.

    Raises:
        ConfigError: If it does not; the message lists the supported schemes, also of plugins.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        return
    key = "track.tracking_uri" if configured else "MLFLOW_TRACKING_URI"
    parts = _parts_of(uri, key)
    if parts.password == HIDDEN:
        raise ConfigError(
            f"{key}={uri}: passwords are not stored, and this address is from a stored "
            f"configuration; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD and leave "
            f"them out of the address, or give {key} with its password again"
        )
    scheme = parts.scheme
    if len(scheme) < 2 or uri in _DATABRICKS:  # a folder; one letter is a drive
        return
    plugins = {point.name for point in entry_points(group="mlflow.tracking_store")}
    supported = {*_SCHEMES, *(f"{name}+DRIVER" for name in _DATABASES), *_DATABRICKS, *plugins}
    name, plus, _ = scheme.partition("+")
    if scheme not in {*supported, *_DATABASES} and not (plus and name in _DATABASES):
        raise ConfigError(
            f"{key}={without_password(uri)}: MLflow does not support addresses that "
            f"begin with {scheme}:; give a folder, or an address that begins with one of "
            f"{', '.join(sorted(supported))}. track.mlflow=false turns MLflow off"
        )
    if scheme in ("http", "https") and not urlsplit(uri).hostname:
        raise ConfigError(f"{key}={without_password(uri)}: has no host; write {scheme}://HOST:PORT")


def _parts_of(uri: str, key: str) -> SplitResult:
    try:
        parts = urlsplit(uri)
        _ = parts.port  # of a port that is no number from 0 to 65535, only this tells
    except ValueError as error:
        # The address is left out: where it cannot be taken apart, neither can its password.
        raise ConfigError(
            f"{key}: the address has no valid host or port ({error}); write http://HOST:PORT"
        ) from None
    if any(character.isspace() for character in uri.strip()) and parts.scheme in ("http", "https"):
        raise ConfigError(f"{key}={without_password(uri)}: an address has no spaces")
    return parts


def without_password(uri: str) -> str:
    """Return a URI with its password replaced by ``***``."""
    return hide_passwords(uri)


def compare_line(configured: str | None, *, folder: Path) -> str:
    """Return how to compare the runs: MLflow's command, or the URL of a server.

    The result has no password: for a URI with one from the environment, the command names the
    variable.

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
