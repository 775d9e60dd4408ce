"""List the members of a tar file from its headers, and find defects of the file."""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

_BLOCK = 512
_END = bytes(_BLOCK)
_RECORD = 20 * _BLOCK  # tar pads files to a multiple of this
_SPACES = 8 * b" "
_ADLER_MODULUS = 65521
_BASE_256 = 0x80
# Type flags of regular files, of links, of members without content, and of extended headers.
_PLAIN = b"0\x007"
_LINKS = b"12"
_NO_CONTENT = b"12345 6"
_EXTENDED = b"LKxg"
_MOST_EXTENDED_BYTES = 1 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
}


class Member(NamedTuple):
    """A regular file in a tar file, or a link, which has no content."""

    name: bytes
    offset: int
    size: int
    is_link: bool


class Flaw(NamedTuple):
    """A defect of a tar file."""

    kind: str
    """Text of a note, after "3 tar shards"."""
    detail: str
    """Text of an error, after the file's name."""
    may_pass: bool = False
    """Whether the storage, not the file, caused it, so that another attempt may succeed."""


def members(at: Callable[[int, int], bytes], size: int) -> Iterator[Member | Flaw]:
    """Yield the files and links of a tar file in order, and at the end its flaw if it has one.

    Args:
        at: Returns ``count`` bytes at an offset, fewer at the end of the file.
        size: Size of the tar file in bytes.
    """
    place = 0
    fields: dict[bytes, bytes] = {}  # of the next file, from preceding extended headers
    if size == 0:
        yield Flaw("left out: 0 bytes", "the file has 0 bytes. Copy it again")
        return
    while place < size:
        header = at(place, _BLOCK)
        if header == _END:
            if at(place, min(_RECORD, size - place)).strip(b"\0"):
                yield _TRAILING_DATA
            return
        count = _content_size(header, place, fields)
        if isinstance(count, Flaw):
            yield count
            return
        kind, content = header[156:157], place + _BLOCK
        if content + count > size:
            yield _cut_short(place, content + count, size)
            return
        place = content + -(-count // _BLOCK) * _BLOCK
        if kind in _EXTENDED:
            fields |= _extended(kind, at(content, min(count, _MOST_EXTENDED_BYTES)))
            continue
        if kind in _PLAIN or kind in _LINKS:
            yield Member(fields.get(b"path") or _name(header), content, count, kind in _LINKS)
        fields = {}
    yield _UNCLOSED


def compressed(path: str, how: str) -> str:
    """Return the advice for a compressed shard."""
    return f"{path}: {_compressed(how).detail}"


def _compressed(how: str) -> Flaw:
    return Flaw(
        f"left out: compressed ({how}); unpack them to .tar",
        f"is compressed ({how}), so an image in it cannot be read without all data before "
        f"it. Unpack it to .tar, or convert it to Parquet shards (raysl pack)",
    )


_UNCLOSED = Flaw(
    "without the blocks that close a tar file, perhaps cut short",
    "ends without the blocks that close a tar file. Copy it again",
)
_TRAILING_DATA = Flaw(
    "with data after the closing blocks, which are not read (tar files joined with cat?)",
    "has data after its closing blocks. Join tar files with tar -A, not with cat",
)
_SPARSE = Flaw(
    "read up to a sparse file; write them without tar -S",
    "holds sparse files; write it without them (tar without -S)",
)


def _cut_short(place: int, end: int, size: int) -> Flaw:
    return Flaw(
        "cut short, read up to there",
        f"cut short: the member at byte {place:,} ends at {end:,}, the file at {size:,}. Copy it "
        f"again",
    )


def _content_size(header: bytes, place: int, fields: dict[bytes, bytes]) -> int | Flaw:
    """Return the size of the content after a header, or a flaw."""
    count, kind = _checked_size(header, place), header[156:157]
    if isinstance(count, Flaw) or (kind == b"0" and not fields):
        return count
    if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in fields):
        return _SPARSE
    if kind in _NO_CONTENT:
        return 0
    try:
        return count if kind in _EXTENDED else max(0, int(fields.get(b"size", count)))
    except ValueError:
        return _damaged(place)


def _checked_size(header: bytes, place: int) -> int | Flaw:
    """Return the size in a header's size field, or a flaw if the header is not valid."""
    if place == 0:
        for magic, name in _COMPRESSED.items():
            if header.startswith(magic):
                return _compressed(name)
    if len(header) < _BLOCK:
        if place == 0:
            return _NOT_TAR
        where = f"cut short at byte {place + len(header):,}. Copy it again"
        return Flaw("cut short, read up to there", where)
    # A header's checksum is the sum of its bytes, with spaces in the checksum field. The lower half
    # of Adler-32 is 1 plus the sum of the bytes, and zlib computes it in C.
    total = zlib.adler32(header[156:], zlib.adler32(_SPACES, zlib.adler32(header[:148]))) & 0xFFFF
    try:
        if total == (_number(header[148:156]) + 1) % _ADLER_MODULUS:
            return max(0, _number(header[124:136]))
    except ValueError:
        pass
    return _NOT_TAR if place == 0 else _damaged(place)


_NOT_TAR = Flaw(
    "left out: not tar files", "not a tar file: it does not begin with the header of a member"
)


def _damaged(place: int) -> Flaw:
    return Flaw(
        "damaged, read up to there",
        f"damaged at byte {place:,}: no valid header of a member. Copy it again",
    )


def _number(field: bytes) -> int:
    if field[0] == _BASE_256:  # how sizes of 8 GiB and more are encoded
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # Old GNU headers store times where POSIX stores the first part of a long path.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extended(kind: bytes, text: bytes) -> dict[bytes, bytes]:
    """Return the fields that an extended header sets for the file after it."""
    if kind == b"L":
        return {b"path": text.rstrip(b"\0")}
    return _pax(text) if kind == b"x" else {}


def _pax(text: bytes) -> dict[bytes, bytes]:
    """Return the records ``LENGTH KEY=VALUE`` of a POSIX extended header."""
    records = {}
    while match := re.match(rb"(\d+) ([^=]+)=", text):
        length = int(match[1])
        if length <= match.end():
            break
        records[match[2]] = text[match.end() : length - 1]
        text = text[length:]
    return records
