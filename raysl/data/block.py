"""Names of the columns of a block, which data workers write and training reads.

Separate from the code that makes blocks, so that readers need not load it.
"""

from typing import Any

Block = dict[str, Any]
"""Arrays of equal length, by column name."""

INDEX, STEP, BAD, FLAW = "index", "step", "bad", "flaw"
_VIEWS, _NUMBERS = "views_", "numbers_"


def view_column(kind: int) -> str:
    """Return the column name of a kind of view."""
    return f"{_VIEWS}{kind}"


def is_view_column(name: str) -> bool:
    """Return whether a column holds views."""
    return name.startswith(_VIEWS)


def kind_of(name: str) -> int:
    """Return the kind of view that a column holds."""
    return int(name.removeprefix(_VIEWS))


def numbers_column(kind: int) -> str:
    """Return the column name of the op parameters that the device needs for a kind of view."""
    return f"{_NUMBERS}{kind}"
