"""Names of the columns of a block, which data workers write and training reads.

Training reads blocks without loading the code that makes them, so the names are in this module.
"""

from typing import Any

Block = dict[str, Any]
"""Arrays of equal length, by column name."""

INDEX, STEP, BAD, FLAW = "index", "step", "bad", "flaw"
_VIEWS, _NUMBERS = "views_", "numbers_"


def view_column(kind: int) -> str:
    """Return the name of the column that holds a kind of view."""
    return f"{_VIEWS}{kind}"


def is_view_column(name: str) -> bool:
    """Return whether a column holds views."""
    return name.startswith(_VIEWS)


def view_kind(name: str) -> int:
    """Return the number of the kind of view that a column holds."""
    return int(name.removeprefix(_VIEWS))


def numbers_column(kind: int) -> str:
    """Return the name of the column with the op parameters for a kind of view on the device."""
    return f"{_NUMBERS}{kind}"
