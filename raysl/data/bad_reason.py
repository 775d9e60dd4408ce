"""Explain in words why a row of a source is bad."""

import numpy as np

from raysl.data.decode import Flaw
from raysl.errors import RayslError
from raysl.sources.source import Source, Unreadable


def reason_of(source: Source, row: int, flaw: Flaw) -> str:
    """Return the reason why a row is bad, as a sentence fragment.

    A block carries a flaw as one byte, which has no room for the operating system's error message.
    So
    a file that cannot be read is opened once more to get that message; such files are rare.
    """
    if flaw != Flaw.UNREADABLE:
        return flaw.reason
    try:
        (again,) = source.read(np.array([row], dtype=np.int64))
    except RayslError:
        return flaw.reason
    return again.reason if isinstance(again, Unreadable) else flaw.reason
