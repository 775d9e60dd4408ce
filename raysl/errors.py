"""The exceptions that raysl raises on purpose.

    RayslError
    +-- ConfigError         a key, a value or a combination in a YAML file or an override
    +-- DataError           a source that cannot be opened, or that lacks the requested content
    |   +-- DecodeError     bytes that are not an image
    +-- ShapeError          a tensor of the wrong shape (also a ValueError)
    +-- ClusterError        too few CPUs or GPUs, a folder that a node cannot reach
    +-- RunFolderError      a run folder in use, damaged, or of another configuration
    +-- ExportError         an exported encoder with other results than the original
    +-- DivergedError       a loss or gradient that is not finite
    +-- CollapsedError      features that are the same for every image
    +-- HungError           a training step that does not end
    +-- RanksDifferError    train workers whose weights or buffers are no longer equal
    +-- SweepError          a sweep whose trials were lost or failed, or that has no best trial
    +-- StoppedError        a training that was asked to stop, and has written a checkpoint
    KeyboardInterrupt
    +-- Terminated          SIGTERM, which ends a command as Ctrl-C does

Each takes one argument, the message: Ray pickles exceptions between processes, and a class whose
``__init__`` takes more arguments loses its message. A message says where the problem is, what was
given, what is allowed and what to do. :class:`ErrorRecord` stores an error as plain values.
"""

import re
from collections.abc import Iterable
from typing import TypedDict, final

HIDDEN = "***"
"""Replaces a password in what is printed or stored."""
_PASSWORD = re.compile(r"(?<=://)([^\s/?#@:]*):[^\s/?#]*(?=@)")
_PARAMETER = re.compile(r"(?<=[?&])(\w*(?:key|secret|token|sig|word))=[^&\s]*", re.IGNORECASE)


def hide_passwords(text: str) -> str:
    """Return a text in which the passwords of addresses are hidden.

    They are those of ``scheme://user:password@host`` and of parameters such as ``?password=``.
    """
    return _PARAMETER.sub(rf"\1={HIDDEN}", _PASSWORD.sub(rf"\1:{HIDDEN}", text))


class RayslError(Exception):
    """Base class of all; the command line prints its message without a traceback or passwords."""

    on_every_rank = False
    """Whether every train worker raises this error at the same step, so that none waits."""

    def __init__(self, message: object = "") -> None:
        super().__init__(hide_passwords(str(message)))


class ConfigError(RayslError):
    """A key, a value or a combination of them is wrong."""


class DataError(RayslError):
    """A source cannot be opened, or lacks the requested content."""


class DecodeError(DataError):
    """Bytes are not an image that raysl can decode."""


class ShapeError(RayslError, ValueError):
    """A tensor has the wrong shape."""


class ClusterError(RayslError):
    """The cluster cannot run the requested work."""


class RunFolderError(RayslError):
    """A run folder is in use, damaged, or belongs to another configuration."""


class ExportError(RayslError):
    """An encoder in another format has other results than the original; it is not kept."""


class DivergedError(RayslError):
    """The loss or its gradient is not finite."""


class CollapsedError(RayslError):
    """All images have the same features."""


class HungError(RayslError):
    """A training step does not end."""


class RanksDifferError(RayslError):
    """Train workers hold different values of weights or buffers that must be equal."""


class SweepError(RayslError):
    """A sweep lost trials, some of its trials failed, or it has no best trial."""


class StoppedError(RayslError):
    """A training was asked to stop, and has written a checkpoint of its last step."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM: by Slurm, Kubernetes or ``ray job stop``."""


@final
class ErrorRecord(TypedDict):
    """A raysl error as plain values, for another process or a file."""

    error: str
    """Name of the error's class."""
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
    """Format a count for a message: "1 image", "1,200 images"; ``what`` is the singular."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(values: Iterable[object], *, last: str = "and") -> str:
    """Format values for a message: "1", "1 and 2", "1, 2 and 4"; none give an empty text."""
    *first, end = [str(value) for value in values] or [""]
    return f"{', '.join(first)} {last} {end}" if first else end
