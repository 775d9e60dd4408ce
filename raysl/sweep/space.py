"""From a sweep to its candidates: which settings are tried."""

from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """One point of a sweep's space."""

    number: int
    """0, 1, ...; the trial's folder is named after it."""
    params: dict[str, Any]
    """What people see and compare: dotted setting (or ``config``, ``seed``) to a scalar, the label
    of a value that is none."""
    values: dict[str, Any]
    """Dotted setting to its real value, for the run; without ``config``."""
    base: str
    """Its base file."""


def trial_name(number: int) -> str:
    """Return the name of a trial's folder."""
    return f"{number:04d}"
