"""Distinguish lasting read errors (a bad image) from transient ones (which end a run)."""

import errno
import re
import time
from collections.abc import Hashable

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.sources.storage import is_local

# Transient errors of a local disk: no free file handles or memory, a network disk that does not
# answer.
_TRANSIENT = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EAGAIN,
        errno.EINTR,
        errno.ETIMEDOUT,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
    }
)
_REFUSED = re.compile("ACCESS_DENIED|NO_SUCH_KEY")


def is_lasting(
    filesystem: pafs.FileSystem, error: Exception, path: str, *, start: int = 0, count: int = 1
) -> bool:
    """Return whether a read error would also occur on a later attempt.

    On a local disk, the error number decides. Errors of object stores have no number, and a damaged
    file raises the same errors as a broken connection. If the raw bytes can be read, the file is
    damaged and the error is lasting.

    Args:
        filesystem: The file system of the file.
        error: The exception raised by the read.
        path: Path of the file.
        start: First byte of the range that was read.
        count: Length of the range in bytes.
    """
    if isinstance(error, MemoryError):
        return False
    if not isinstance(error, OSError) or _is_refusal(error):
        return True
    if is_local(filesystem):
        return error.errno not in _TRANSIENT
    try:
        with filesystem.open_input_file(path) as file:
            file.read_at(count, start)
    except (OSError, pa.ArrowException) as second_error:
        return not isinstance(second_error, OSError) or _is_refusal(second_error)
    return True


def _is_refusal(error: OSError) -> bool:
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or bool(_REFUSED.search(str(error)))


class Failures:
    """Recent read failures by place, so that the rows of one place do not each retry it.

    A pickled object is empty.

    Args:
        seconds: Time after which a place is retried.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._until: dict[Hashable, tuple[float, str]] = {}

    def __reduce__(self) -> tuple[type["Failures"], tuple[float]]:
        return type(self), (self.seconds,)

    def get(self, place: Hashable) -> str | None:
        """Return why a place could not be read recently, or None."""
        until, reason = self._until.get(place, (0.0, ""))
        return reason if time.monotonic() < until else None

    def add(self, place: Hashable, reason: str) -> None:
        """Record a failure."""
        self._until[place] = time.monotonic() + self.seconds, reason
