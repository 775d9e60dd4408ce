"""Classify errors of MLflow's client, and say whether to retry or what to change.

The cases are those of MLflow 3.17. Its client wraps errors of servers, database drivers and the
network in only a few classes, so the text of an error often decides.
"""

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from raysl.track.uri import is_file_store, without_password

NO_ANSWER = "the tracking server does not answer"

_UNKNOWN_USER = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")


class MlflowProblem(NamedTuple):
    """The reason why MLflow does not accept records."""

    text: str
    """The error in one line, without a password."""
    cure: str | None
    """What to do; None if a retry may succeed, such as for a server that is down."""


class DeletedExperimentError(Exception):
    """The experiment was deleted in MLflow and does not accept runs.

    Args:
        name: Name of the experiment.
        number: Id of the experiment.
    """

    def __init__(self, name: str, number: str) -> None:
        super().__init__(f"the experiment {name!r} was deleted")
        self.name = name
        self.number = number


def problem_of(error: BaseException, *, uri: str, experiment: str) -> MlflowProblem:
    """Describe an error of MLflow's client as a problem, with a cure if there is one.

    Args:
        error: Exception that MLflow's client raised.
        uri: MLflow tracking URI.
        experiment: Name of the experiment.
    """
    printable_uri = without_password(uri)
    quoted = uri.rstrip("/")  # as MLflow's messages quote it
    text = f"{type(error).__name__}: {error}".replace(
        quoted, without_password(quoted)
    ).splitlines()[0]
    return MlflowProblem(text, _cure(error, uri, printable_uri, experiment))


def _cure(error: BaseException, uri: str, printable_uri: str, experiment: str) -> str | None:
    if any(_package(each) == "requests" for each in _chain(error)):
        return None  # a refused or slow connection, an unresolved host, a server that restarts
    other = f"set another one with track.experiment=NAME (now {experiment})"
    code, text = str(getattr(error, "error_code", "")), str(error)
    if isinstance(error, DeletedExperimentError):
        restore = shlex.join(["mlflow", "experiments", "restore", "--experiment-id", error.number])
        variable = f"MLFLOW_TRACKING_URI={shlex.quote(printable_uri)}"
        return f"{other}, or restore it:\n    {variable} {restore}"
    cases = (
        (
            code in _UNKNOWN_USER,
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, "
            "to a user of the server",
        ),
        (
            code == "PERMISSION_DENIED",
            f"the user may not write to the experiment: ask its owner to allow it, or {other}",
        ),
        (
            code == "ENDPOINT_NOT_FOUND" or "not in a valid JSON format" in text,
            f"what answers at {printable_uri} is not an MLflow tracking server: check host, port "
            f"and path",
        ),
        (
            is_file_store(uri),
            "give a database, such as track.tracking_uri=sqlite:///mlflow.db (mlflow "
            "migrate-filestore moves earlier runs there), or set MLFLOW_ALLOW_FILE_STORE=true",
        ),
        (
            "unsupported URI" in text,
            "set track.tracking_uri to an address that MLflow supports: http://HOST:PORT, "
            "https://..., sqlite:///FILE, postgresql://..., mysql://..., mssql://... or databricks",
        ),
        (
            "out-of-date database schema" in text,
            "after a backup, bring it up to date:\n    "
            + shlex.join(["mlflow", "db", "upgrade", printable_uri]),
        ),
        (
            isinstance(error, ModuleNotFoundError),
            f"install {getattr(error, 'name', None)}, which MLflow needs for "
            f"{printable_uri.partition(':')[0]}",
        ),
        (
            "file is not a database" in text or "unable to open database file" in text,
            "give another file: track.tracking_uri=sqlite:///FILE",
        ),
        (
            isinstance(error, OSError),
            "make it writable, or set another place with track.tracking_uri",
        ),
    )
    return next((cure for applies, cure in cases if applies), None)


def is_inactive(error: BaseException) -> bool:
    """Return whether the error means that the run or its experiment was deleted."""
    return isinstance(error, MlflowException) and "must be in the 'active' state" in str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]
