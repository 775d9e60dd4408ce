"""Read the header of Netpbm files (PBM, PGM, PPM, PAM) and of PFM.

Source: the Netpbm manual's pages pbm(5), pgm(5), ppm(5), pam(5) and pfm(5).
"""

import re
from typing import NamedTuple

from raysl.data.header_fields import Header

_HEAD_BYTES = 4096
_TOKEN = re.compile(rb"(?:\s|#[^\n\r]*[\n\r])*([^\s#]+)")
_CHANNELS = {1: 1, 2: 1, 3: 3, 4: 1, 5: 1, 6: 3}


class Netpbm(NamedTuple):
    """The parsed header."""

    kind: str
    """The digit or letter after the P."""
    width: int
    height: int
    channels: int
    maximum: float
    """The value of white. For PFM the scale, which is negative for little-endian values."""
    start: int
    """Offset of the first pixel, in bytes."""


def read_netpbm_header(data: memoryview) -> Header:
    """Return the fields that all formats share."""
    head = netpbm_header(data)
    is_float = head.kind in "fF"
    bits = 32 if is_float else 16 if head.maximum > 255 else 8
    color = "rgb" if head.channels > 2 else "grey"
    color += " alpha" if head.channels in (2, 4) else ""
    return Header("netpbm", head.width, head.height, color, bits, is_float=is_float)


def netpbm_header(data: bytes | memoryview) -> Netpbm:
    """Parse the header.

    Raises:
        ValueError: If it is damaged.
    """
    head = bytes(data[:_HEAD_BYTES])
    kind = head[1:2].decode("ascii")
    if kind == "7":
        return _pam(head)
    at, values = 2, []
    for _ in range(2 if kind in "14" else 3):
        token = _TOKEN.match(head, at)
        if token is None:
            raise ValueError("the header ends early")
        values.append(float(token[1]))
        at = token.end()
    width, height, maximum = int(values[0]), int(values[1]), values[2] if len(values) > 2 else 1.0
    channels = {"F": 3, "f": 1}.get(kind) or _CHANNELS[int(kind)]
    return _checked(Netpbm(kind, width, height, channels, maximum, at + 1))


def _pam(head: bytes) -> Netpbm:
    end = head.index(b"ENDHDR\n") + len(b"ENDHDR\n")
    lines = [line.split(None, 1) for line in head[:end].decode("latin-1").split("\n")]
    fields = {words[0]: words[1] for words in lines if len(words) == 2}
    try:
        width, height, depth, maximum = (
            int(fields[name]) for name in ("WIDTH", "HEIGHT", "DEPTH", "MAXVAL")
        )
    except KeyError as error:
        raise ValueError(f"no {error}") from error
    return _checked(Netpbm("7", width, height, depth, float(maximum), end))


def _checked(head: Netpbm) -> Netpbm:
    sound = head.width > 0 and head.height > 0 and 1 <= head.channels <= 4 and head.maximum
    if not sound or (head.kind not in "fF" and not 0 < head.maximum < 1 << 16):
        raise ValueError("values that no such file has")
    return head
