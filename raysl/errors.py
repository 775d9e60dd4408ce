"""The exceptions that raysl raises on purpose.

    RayslError
    +-- ConfigError         a key, a value or a combination in a YAML file or an override
    +-- DataError           a source that cannot be opened or does not hold what was asked for
    |   +-- DecodeError     bytes that are not an image
    +-- ShapeError          a tensor of the wrong shape (also a ValueError)
    +-- ClusterError        too few CPUs or GPUs, a folder that a node does not see
    +-- RunFolderError      a run folder in use, damaged, or of another configuration
    +-- ExportError         what was written does not do what it should
    +-- DivergedError       a loss or gradient that is not finite
    +-- CollapsedError      features that are the same for every image
    +-- SweepError          a sweep whose trials were lost or failed, or that has no best one

Each takes one message: Ray pickles exceptions between processes, and a class whose ``__init__``
takes more loses its text on the way. A message says where, what was given, what is allowed and
what to do. Where an error has to cross as plain values it goes as an :class:`ErrorRecord`.
"""

from typing import TypedDict, final


class RayslError(Exception):
    """The parent of all; the command line prints its message without a traceback."""


class ConfigError(RayslError):
    """A key, a value or a combination of them is wrong."""


class DataError(RayslError):
    """A source cannot be opened, or does not hold what was asked for."""


class DecodeError(DataError):
    """Bytes that are not an image we can decode."""


class ShapeError(RayslError, ValueError):
    """A tensor has the wrong shape."""


class ClusterError(RayslError):
    """The cluster cannot run what was asked for."""


class RunFolderError(RayslError):
    """A run folder is in use, damaged, or belongs to another configuration."""


class ExportError(RayslError):
    """A copy in another format does not do what the original does; it is not kept."""


class DivergedError(RayslError):
    """The loss or its gradient is not finite."""


class CollapsedError(RayslError):
    """All images have the same features."""


class SweepError(RayslError):
    """A sweep lost trials, or some failed, or none of them is the best."""


@final
class ErrorRecord(TypedDict):
    """A raysl error as plain values, for another process or a file."""

    error: str
    """Name of its class."""
    message: str


def to_record(error: RayslError) -> ErrorRecord:
    """Convert an error to plain values."""
    return {"error": type(error).__name__, "message": str(error)}


def from_record(record: ErrorRecord) -> RayslError:
    """Convert plain values back to an error; an unknown class becomes RayslError."""
    kind = globals().get(record["error"])
    if not (isinstance(kind, type) and issubclass(kind, RayslError)):
        kind = RayslError
    return kind(record["message"])


def counted(number: int, what: str) -> str:
    """Return "1 image", "2 images", "1,200 images" for a message; ``what`` is the singular."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
