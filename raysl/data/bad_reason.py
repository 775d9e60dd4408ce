"""Why an image is bad, as fully as it can be told."""

import numpy as np

from raysl.data.decode import Flaw
from raysl.errors import RayslError
from raysl.sources.source import Source, Unreadable


def reason_of(source: Source, row: int, flaw: Flaw) -> str:
    """Return why a row is bad.

    A flaw travels as a number. What a disk said of a file that cannot be read does not fit in, and
    such files are few: the file is asked once more.
    """
    if flaw != Flaw.UNREADABLE:
        return flaw.reason
    try:
        (again,) = source.read(np.array([row], dtype=np.int64))
    except RayslError:
        return flaw.reason
    return again.reason if isinstance(again, Unreadable) else flaw.reason
