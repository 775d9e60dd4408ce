"""A block of the stream: the names of its columns, which data workers write and training reads.

No more than names, so that who reads blocks need not load what makes them.
"""

from typing import Any

Block = dict[str, Any]
"""Columns by name: arrays of one length."""

INDEX, STEP, BAD, FLAW = "index", "step", "bad", "flaw"
_VIEWS, _NUMBERS = "views_", "numbers_"


def view_column(kind: int) -> str:
    """Return the name of a block's column for a kind of view."""
    return f"{_VIEWS}{kind}"


def is_view_column(name: str) -> bool:
    """Return whether a column holds views."""
    return name.startswith(_VIEWS)


def kind_of(name: str) -> int:
    """Return the kind of view that a column holds."""
    return int(name.removeprefix(_VIEWS))


def numbers_column(kind: int) -> str:
    """Return the name of a block's column for the plans that the device is to carry out."""
    return f"{_NUMBERS}{kind}"
