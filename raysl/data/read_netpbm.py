"""Read the pixels of Netpbm and PFM files, in text or binary form.

Not left to a library: libraries disagree if the maximum is neither 255 nor 65,535.
"""

import re
from typing import Any

import numpy as np

from raysl.data.flaw import Flaw
from raysl.data.header_netpbm import Netpbm, netpbm_header
from raysl.data.samples import Color, Samples, Values

_TEXT = "123"
_COMMENT = re.compile(rb"#[^\n\r]*")


def read_netpbm(encoded: bytes | memoryview) -> Samples | Flaw:
    """Return the pixels of the first image."""
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
        return 1 - _shaped(head, digits.astype(np.int64) - ord("0"))
    return _shaped(head, np.array(data.split()[: _count(head)], dtype=np.int64))


def _binary(head: Netpbm, data: bytes) -> Values:
    if head.kind == "4":  # one bit a pixel, rows start at a byte, 1 is black
        row = -(-head.width // 8)
        packed = np.frombuffer(data, np.uint8, row * head.height).reshape(head.height, row)
        return 1 - np.unpackbits(packed, axis=1)[:, : head.width].astype(np.int64)
    if head.kind in "fF":
        name = "<f4" if head.maximum < 0 else ">f4"
    else:
        name = "u1" if head.maximum <= 255 else ">u2"
    kind: np.dtype[Any] = np.dtype(name)
    values = np.frombuffer(data, kind, _count(head))
    return _shaped(head, values.astype(kind.newbyteorder("=")))


def _count(head: Netpbm) -> int:
    return head.height * head.width * head.channels


def _shaped(head: Netpbm, values: Values) -> Values:
    """Return ``(H, W)`` or ``(H, W, 3)`` without alpha."""
    shaped = values[: _count(head)].reshape(head.height, head.width, head.channels)
    return shaped[..., 0] if head.channels < 3 else np.ascontiguousarray(shaped[..., :3])
