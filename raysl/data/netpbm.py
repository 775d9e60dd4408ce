"""Read Netpbm files (PBM, PGM, PPM, PAM) and PFM, in text or binary form.

This module does not use a library, because libraries disagree about other maxima than 255 and
65,535.

Source: the Netpbm manual's pages pbm(5), pgm(5), ppm(5), pam(5) and pfm(5).
"""

import re
from typing import Any, NamedTuple

import numpy as np

from raysl.data.flaw import Flaw
from raysl.data.header_fields import Header
from raysl.data.samples import Color, Samples, Values

_HEAD_BYTES = 4096
_TOKEN = re.compile(rb"(?:\s|#[^\n\r]*[\n\r])*([^\s#]+)")
_CHANNELS = {1: 1, 2: 1, 3: 3, 4: 1, 5: 1, 6: 3}
_TEXT = "123"
_COMMENT = re.compile(rb"#[^\n\r]*")


class Netpbm(NamedTuple):
    """The parsed header of a Netpbm or PFM file."""

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
    """Return the header's fields that all image formats have."""
    head = netpbm_header(data)
    is_float = head.kind in "fF"
    bits = 32 if is_float else 16 if head.maximum > 255 else 8
    color = "rgb" if head.channels > 2 else "grey"
    color += " alpha" if head.channels in (2, 4) else ""
    return Header("netpbm", head.width, head.height, color, bits, is_float=is_float)


def netpbm_header(data: bytes | memoryview) -> Netpbm:
    """Parse the header of a Netpbm or PFM file.

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
    return _check(Netpbm(kind, width, height, channels, maximum, at + 1))


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
    return _check(Netpbm("7", width, height, depth, float(maximum), end))


def _check(head: Netpbm) -> Netpbm:
    is_valid = head.width > 0 and head.height > 0 and 1 <= head.channels <= 4 and head.maximum
    if not is_valid or (head.kind not in "fF" and not 0 < head.maximum < 1 << 16):
        raise ValueError("values that no Netpbm file has")
    return head


def read_netpbm(encoded: bytes | memoryview) -> Samples | Flaw:
    """Decode the first image of a file."""
    try:
        head = netpbm_header(encoded)
        data = bytes(encoded[head.start :])
        values = _text(head, data) if head.kind in _TEXT else _binary(head, data)
    except ValueError:  # an invalid header, or too few values
        return Flaw.DAMAGED
    if head.kind in "fF":
        # The lowest row is stored first; the magnitude of the scale is the value of white.
        return Samples(np.ascontiguousarray(values[::-1]), _color(head), (0.0, abs(head.maximum)))
    if values.max(initial=0) > head.maximum:
        return Flaw.DAMAGED
    kind = np.uint8 if head.maximum <= 255 else np.uint16
    whole = head.maximum in (255, 65_535)
    return Samples(values.astype(kind), _color(head), None if whole else (0.0, head.maximum))


def _color(head: Netpbm) -> Color:
    return "rgb" if head.channels > 2 else "grey"


def _text(head: Netpbm, data: bytes) -> Values:
    data = _COMMENT.sub(b" ", data)
    if head.kind == "1":  # digits need no space between them
        digits = np.frombuffer(b"".join(data.split()), np.uint8)
        return 1 - _reshape(head, digits.astype(np.int64) - ord("0"))
    return _reshape(head, np.array(data.split()[: _count(head)], dtype=np.int64))


def _binary(head: Netpbm, data: bytes) -> Values:
    if head.kind == "4":  # one bit per pixel; each row starts at a byte; 1 is black
        row = -(-head.width // 8)
        packed = np.frombuffer(data, np.uint8, row * head.height).reshape(head.height, row)
        return 1 - np.unpackbits(packed, axis=1)[:, : head.width].astype(np.int64)
    if head.kind in "fF":
        name = "<f4" if head.maximum < 0 else ">f4"
    else:
        name = "u1" if head.maximum <= 255 else ">u2"
    kind: np.dtype[Any] = np.dtype(name)
    values = np.frombuffer(data, kind, _count(head))
    return _reshape(head, values.astype(kind.newbyteorder("=")))


def _count(head: Netpbm) -> int:
    return head.height * head.width * head.channels


def _reshape(head: Netpbm, values: Values) -> Values:
    """Reshape values to ``(H, W)`` or ``(H, W, 3)``, without alpha."""
    shaped = values[: _count(head)].reshape(head.height, head.width, head.channels)
    return shaped[..., 0] if head.channels < 3 else np.ascontiguousarray(shaped[..., :3])
