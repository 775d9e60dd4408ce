"""Extract raysl's own errors from the exceptions that Ray wraps around them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray

from raysl.errors import ClusterError, RayslError, from_record

T = TypeVar("T")

_OWN_ERROR = re.compile(r"^raysl\.errors\.(\w+): (.+?)(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


@contextmanager
def own_errors(what: str) -> Iterator[None]:
    """Raise raysl's own error in place of those that Ray wrapped around it.

    Ray Data loses the error itself between its processes, but not its text, a traceback.

    Args:
        what: Failed, if it is an error of Ray's.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        found = _OWN_ERROR.findall(str(error))
        if found:
            name, message = found[-1]
            raise from_record({"error": name, "message": message}) from None
        last = str(error).strip().splitlines()[-1]
        raise ClusterError(f"{what} failed: {type(error).__name__}: {last}") from None


def wrapped_in(error: BaseException | None) -> Iterator[RayslError]:
    """Yield raysl's own errors among those that Ray wrapped around them, the outermost first."""
    while error is not None:
        # Ray makes classes that are both its own and the cause's; their text is a traceback.
        if isinstance(error, RayslError) and not isinstance(error, ray.exceptions.RayError):
            yield error
        error = getattr(error, "cause", None) or error.__cause__


def result_of(reference: "ray.ObjectRef[T]", *, lost: str) -> T:
    """Return what a task returned, or raise what it raised, which Ray hands on as it was.

    Args:
        reference: Of the task.
        lost: What to say, before Ray's own words, if Ray gave the task up.

    Raises:
        ClusterError: If it did.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{lost}: {error}") from None
