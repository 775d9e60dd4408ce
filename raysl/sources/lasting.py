"""Tell lasting read errors (a bad image) from passing ones (which end a run), and remember both."""

import errno
import re
import time
from collections.abc import Hashable

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.sources.storage import is_local

# Errors of a local disk that may pass: no free file handles or memory, a network disk that does not
# answer.
_PASSING = frozenset(
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
    """Return whether a read error would recur however long one waits.

    On a local disk, the error number tells. Errors of object stores have none, and damaged files
    look like broken connections: if the raw bytes can be read, the file is damaged.

    Args:
        filesystem: The file system of the file.
        error: The exception raised by the read.
        path: The file's path.
        start: First byte of the range that was read.
        count: Length of the range.
    """
    if isinstance(error, MemoryError):
        return False
    if not isinstance(error, OSError) or _is_refusal(error):
        return True
    if is_local(filesystem):
        return error.errno not in _PASSING
    try:
        with filesystem.open_input_file(path) as file:
            file.read_at(count, start)
    except (OSError, pa.ArrowException) as again:
        return not isinstance(again, OSError) or _is_refusal(again)
    return True


def _is_refusal(error: OSError) -> bool:
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or bool(_REFUSED.search(str(error)))


class Failures:
    """Remember recent failures, so that the rows of one bad place do not each retry it.

    Empty after unpickling.

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
