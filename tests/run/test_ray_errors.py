"""raysl's own errors come out of what Ray makes of them; no cluster is needed to see that."""

import pytest
from ray.exceptions import RayTaskError

from raysl.errors import ClusterError, DataError, DecodeError
from raysl.run.ray_errors import own_errors, wrapped_errors

TRACEBACK = """\
Traceback (most recent call last):
  File "there.py", line 3, in read
raysl.errors.DecodeError: a.jpg: no image

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
ray.data.exceptions.UserCodeException: read failed
"""


def as_ray_raises(error: Exception, text: str = "a traceback") -> Exception:
    """Return what ``ray.get`` raises for a task that raised an error: of both classes."""
    raised = RayTaskError("read", text, error).as_instanceof_cause()
    assert isinstance(raised, Exception)
    return raised


def test_what_a_task_raised_comes_out_with_its_own_text() -> None:
    raised = as_ray_raises(DataError("a.tar: is not there"))
    assert isinstance(raised, DataError)  # though its text is a traceback
    (found,) = wrapped_errors(raised)
    assert type(found) is DataError
    assert str(found) == "a.tar: is not there"


def test_causes_are_looked_into_the_outermost_first() -> None:
    outer = ClusterError("a worker is gone")
    outer.__cause__ = as_ray_raises(DecodeError("a.jpg: no image"))
    assert [type(error) for error in wrapped_errors(outer)] == [ClusterError, DecodeError]


@pytest.mark.parametrize("error", [None, OSError("full"), as_ray_raises(OSError("full"))])
def test_others_hold_none(error: Exception | None) -> None:
    assert list(wrapped_errors(error)) == []


def test_an_error_of_which_only_the_text_is_left_is_raised_again() -> None:
    error = RayTaskError("read", TRACEBACK, OSError("lost"))
    (found,) = wrapped_errors(error)
    assert (type(found), str(found)) == (DecodeError, "a.jpg: no image")
    with pytest.raises(DecodeError, match=r"^a\.jpg: no image$"), own_errors("the stream"):
        raise error


def test_an_error_that_is_rays_alone_says_what_failed() -> None:
    match = r"^the stream failed: RayTaskError.*: out of memory$"
    with pytest.raises(ClusterError, match=match), own_errors("the stream"):
        raise RayTaskError("read", "long\nout of memory", OSError("lost"))
