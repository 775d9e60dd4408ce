"""Errors cross to other processes, and to the disk, without a change."""

import json
import pickle

import pytest

import raysl.errors
from raysl.errors import DecodeError, RayslError, from_record, to_record

KINDS = [
    kind
    for kind in vars(raysl.errors).values()
    if isinstance(kind, type) and issubclass(kind, RayslError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_back_as_it_was(kind: type[RayslError]) -> None:
    error = kind("a.jpg: got 3, allowed: 1, 2\n\nset it to 1")
    for again in (from_record(json.loads(json.dumps(to_record(error)))), _pickled(error)):
        assert type(again) is kind
        assert str(again) == str(error)


def _pickled(error: RayslError) -> RayslError:
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, RayslError)
    return again


@pytest.mark.parametrize("name", ["NewerError", "counted", "ErrorRecord", ""])
def test_an_error_of_a_class_that_is_not_known_is_still_raysls(name: str) -> None:
    again = from_record({"error": name, "message": "why"})
    assert type(again) is RayslError
    assert str(again) == "why"


def test_the_record_has_the_keys_of_the_files_that_lie_in_run_folders() -> None:
    assert to_record(DecodeError("no image")) == {"error": "DecodeError", "message": "no image"}
