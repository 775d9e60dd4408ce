"""Extract raysl's own errors from the exceptions that Ray wraps around them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray

from raysl.errors import ClusterError, RayslError, RunFolderError, from_record

T = TypeVar("T")

_OWN_ERROR = re.compile(r"^raysl\.errors\.(\w+): (.+?)(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


@contextmanager
def own_errors(what: str) -> Iterator[None]:
    """Raise raysl's own error instead of the Ray exception that wraps it.

    Args:
        what: Name of the failed operation, for errors of Ray itself.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        own = next(wrapped_errors(error), None)
        if own is not None:
            try:
                raise own from None
            finally:
                # Its traceback refers to this frame: a cycle that would keep the stream's actors,
                # and their CPUs, until the garbage collector runs.
                del own
        raise ClusterError(f"{what} failed: {last_line(error)}") from None


def last_line(error: Exception) -> str:
    """Return the class of an exception and the last line of its text, which is Ray's reason."""
    last = (str(error).strip().splitlines() or [""])[-1]
    return f"{type(error).__name__}: {last.removesuffix('.')}"


def wrapped_errors(error: BaseException | None) -> Iterator[RayslError]:
    """Yield raysl's own errors in a chain of Ray exceptions, outermost first.

    Ray Data drops the exception object between its processes, but keeps its traceback as text. If
    the chain holds no error of raysl's own, the last one in that text is yielded.
    """
    outermost, is_named = error, False
    while error is not None:
        # Ray derives classes from both RayError and the cause; their text is a traceback.
        if isinstance(error, RayslError) and not isinstance(error, ray.exceptions.RayError):
            is_named = True
            yield error
        error = getattr(error, "cause", None) or error.__cause__
    if not is_named and isinstance(outermost, ray.exceptions.RayError):
        for name, message in _OWN_ERROR.findall(str(outermost))[-1:]:
            yield from_record({"error": name, "message": message})


def folder_error(error: BaseException) -> RunFolderError | None:
    """Return the error of the run folder that ended a training of Ray Train, if one did."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    for failure in [getattr(error, "controller_failure", None), *failures.values()]:
        # Ray wraps what a worker raises, to keep its traceback.
        for own in wrapped_errors(getattr(failure, "_base_exc", failure)):
            if isinstance(own, RunFolderError):
                return own
    return None


def result_of(reference: "ray.ObjectRef[T]", *, lost: str) -> T:
    """Return the result of a task, or raise the exception that it raised.

    Args:
        reference: Result reference of the task.
        lost: Start of the message, before Ray's text, if Ray lost the task.

    Raises:
        ClusterError: If Ray lost the task.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{lost}: {error}") from None
