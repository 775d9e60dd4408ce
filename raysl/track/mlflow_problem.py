"""Explain why MLflow rejected something: whether waiting helps, and otherwise what does.

The kinds were found by asking MLflow 3.17 for each: its client wraps whatever a server, a driver or
the network said, and keeps little of it apart.
"""

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from raysl.track.uri import is_file_store, without_password

NO_ANSWER = "the tracking server does not answer"

_UNKNOWN_USER = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")


class MlflowProblem(NamedTuple):
    """What keeps records from MLflow."""

    text: str
    """One line, without a password."""
    cure: str | None
    """What to do; None where waiting helps, as for a server that is down."""


class DeletedExperimentError(Exception):
    """The experiment is in MLflow's bin, which takes no runs.

    Args:
        name: Of the experiment.
        number: Its id.
    """

    def __init__(self, name: str, number: str) -> None:
        super().__init__(f"the experiment {name!r} was deleted")
        self.name = name
        self.number = number


def problem_of(error: BaseException, *, uri: str, experiment: str) -> MlflowProblem:
    """Tell the kinds of error apart.

    Args:
        error: What MLflow's client raised.
        uri: The tracking URI.
        experiment: Name of the experiment.
    """
    shown = without_password(uri)
    bare = uri.rstrip("/")  # as MLflow's messages quote it
    text = f"{type(error).__name__}: {error}".replace(bare, without_password(bare)).splitlines()[0]
    return MlflowProblem(text, _cure(error, uri, shown, experiment))


def _cure(error: BaseException, uri: str, shown: str, experiment: str) -> str | None:
    if any(_package(each) == "requests" for each in _chain(error)):
        return None  # refused, timed out, a name that is not known by now, a server that restarts
    other = f"give another one by track.experiment=NAME (now {experiment})"
    code, text = str(getattr(error, "error_code", "")), str(error)
    if isinstance(error, DeletedExperimentError):
        restore = shlex.join(["mlflow", "experiments", "restore", "--experiment-id", error.number])
        return f"{other}, or bring it back:\n    MLFLOW_TRACKING_URI={shlex.quote(shown)} {restore}"
    known = (
        (
            code in _UNKNOWN_USER,
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, "
            "to what the server knows",
        ),
        (
            code == "PERMISSION_DENIED",
            f"the user may not write to the experiment: ask its owner to allow it, or {other}",
        ),
        (
            code == "ENDPOINT_NOT_FOUND" or "not in a valid JSON format" in text,
            f"what answers at {shown} is no MLflow tracking server: check host, port and path",
        ),
        (
            is_file_store(uri),
            "give a database, such as track.tracking_uri=sqlite:///mlflow.db (mlflow "
            "migrate-filestore takes earlier runs along), or set MLFLOW_ALLOW_FILE_STORE=true",
        ),
        (
            "unsupported URI" in text,
            "give track.tracking_uri an address that MLflow knows: http://HOST:PORT, https://..., "
            "sqlite:///FILE, postgresql://..., mysql://..., mssql://... or databricks",
        ),
        (
            "out-of-date database schema" in text,
            "after a backup, bring it up to date:\n    "
            + shlex.join(["mlflow", "db", "upgrade", shown]),
        ),
        (
            isinstance(error, ModuleNotFoundError),
            f"install {getattr(error, 'name', None)}, which MLflow needs for "
            f"{shown.partition(':')[0]}",
        ),
        (
            "file is not a database" in text or "unable to open database file" in text,
            "give another file: track.tracking_uri=sqlite:///FILE",
        ),
        (
            isinstance(error, OSError),
            "make it writable, or give another place by track.tracking_uri",
        ),
    )
    return next((cure for applies, cure in known if applies), None)


def is_inactive(error: BaseException) -> bool:
    """Return whether a run or its experiment was deleted while it was written to."""
    return isinstance(error, MlflowException) and "must be in the 'active' state" in str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]
