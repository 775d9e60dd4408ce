"""Whether a failure to read will pass: what lasts is a bad image, what passes ends a run."""

import errno
import re

import pyarrow as pa
import pyarrow.fs as pafs

from raysl.sources.storage import is_local

# Of a disk: no more file handles or memory, or a disk of the network that does not answer.
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
    """Return whether what reading raised would be raised again however long one waited.

    Of a disk, by the error's number. A store's errors carry none, and damage looks like a broken
    connection: if the bytes themselves can be had, it is they that are damaged.

    Args:
        filesystem: Where the file lies.
        error: What reading raised.
        path: Of the file.
        start: First byte of what was read.
        count: Bytes of what was read.
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
