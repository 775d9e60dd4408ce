"""Where the images lie in a tar shard, found from its headers.

A shard in WebDataset's layout: the members of a sample follow one another and share a key, the path
up to the first dot of the base name; what comes after that dot says what the member is.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.sources.formats import IMAGE_SUFFIXES
from raysl.sources.source import SourceConfig
from raysl.sources.storage import is_local, patiently, readable

_BLOCK = 512
_END = bytes(_BLOCK)
_SPACES = 8 * b" "
_ADLER_MODULUS = 65521
_BASE_256 = 0x80
_PLAIN = b"0\x007"
_NO_CONTENT = b"12345 6"
_EXTENDED = b"LKxg"
_MOST_EXTENDED_BYTES = 1 << 20
# A disk is asked for a header and the small members after it. Of an object store, asking costs as
# much time as some MiB, so what lies between the headers is read along.
_LOCAL_READ_BYTES, _REMOTE_READ_BYTES = 8 << 10, 4 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
}


class ShardIndex(NamedTuple):
    """The images of one shard, in their order; all arrays are ``(num_images,)``."""

    path: str
    offsets: npt.NDArray[np.int64]
    """First byte of each image in the file."""
    sizes: npt.NDArray[np.int64]
    labels: pa.Array
    """Integers or texts; null where a sample has none."""
    names: pa.Array | None
    """Names of the members, large_binary; only if a filter asks for them."""
    digest: str


class _Member(NamedTuple):
    name: bytes
    offset: int
    size: int


def index_shard(filesystem: pafs.FileSystem, path: str, config: SourceConfig) -> ShardIndex:
    """Find the images of a shard without reading them, where that is quicker.

    Args:
        filesystem: Where the shard lies.
        path: Of an uncompressed tar file.
        config: ``image_column`` takes the image of that suffix, ``label_column`` the label of that
            key of the sample's .json; else a label is its .cls, or the key ``label``.

    Raises:
        DataError: If it cannot be read, is damaged, cut short or compressed, or a sample holds
            several images and none is chosen.
    """
    try:
        with patiently(filesystem, lambda: filesystem.open_input_file(path)) as file:
            size = file.size()
            step = _LOCAL_READ_BYTES if is_local(filesystem) else _REMOTE_READ_BYTES
            ahead = _ReadAhead(
                lambda start, count: patiently(filesystem, lambda: file.read_at(count, start)),
                step,
            )
            samples = _Samples(path, config, ahead)
            for member in _members(ahead.at, size, path):
                samples.add(member)
            return samples.index(size)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


class _ReadAhead:
    """Reads at least so many bytes at once, forwards."""

    def __init__(self, read: Callable[[int, int], bytes], step: int) -> None:
        self._read, self._step = read, step
        self._start, self._held = 0, b""

    def at(self, start: int, count: int) -> bytes:
        begin = start - self._start
        if begin < 0 or begin + count > len(self._held):
            self._held = bytes(self._read(start, max(count, self._step)))
            self._start, begin = start, 0
        return self._held[begin : begin + count]


def _members(at: Callable[[int, int], bytes], size: int, path: str) -> Iterator[_Member]:
    """Yield the regular files of a tar file, in their order."""
    place = 0
    said: dict[bytes, bytes] = {}  # of the next file, by headers before its own
    while place < size:
        header = at(place, _BLOCK)
        if header == _END:
            return
        kind, count = header[156:157], _checked_size(header, place, path)
        extends = kind in _EXTENDED
        count = 0 if kind in _NO_CONTENT else count if extends else int(said.get(b"size", count))
        content = place + _BLOCK
        end = content + -(-count // _BLOCK) * _BLOCK
        if end > size:
            raise DataError(
                f"{path}: cut short: the member at byte {place:,} ends at {end:,}, the file at "
                f"{size:,}. Copy it again"
            )
        place = end
        if extends:
            said |= _extended(kind, at(content, min(count, _MOST_EXTENDED_BYTES)))
            continue
        if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in said):
            raise DataError(f"{path}: holds sparse files; write it without them (tar without -S)")
        if kind in _PLAIN:
            yield _Member(said.get(b"path") or _name(header), content, count)
        said = {}


def _checked_size(header: bytes, place: int, path: str) -> int:
    """Return the size that a header states, if it is one."""
    if place == 0:
        for magic, name in _COMPRESSED.items():
            if header.startswith(magic):
                raise DataError(compressed(path, name))
    if len(header) < _BLOCK:
        what = f"cut short at byte {place + len(header):,}" if place else "not a tar file"
        raise DataError(f"{path}: {what}. Copy it again")
    # Adler's first half is the sum of the bytes, in C; the sum's own field counts as spaces.
    total = zlib.adler32(header[156:], zlib.adler32(_SPACES, zlib.adler32(header[:148]))) & 0xFFFF
    try:
        if total == (_number(header[148:156]) + 1) % _ADLER_MODULUS:
            return _number(header[124:136])
    except ValueError:
        pass
    what = "not a tar file" if place == 0 else f"damaged at byte {place:,}"
    raise DataError(f"{path}: {what}: no header of a member is there")


def _number(field: bytes) -> int:
    if field[0] == _BASE_256:  # how sizes from 8 GiB on are written
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def compressed(path: str, how: str) -> str:
    """Return what is to be said of a compressed shard."""
    return (
        f"{path}: is compressed ({how}), so that no image in it can be found without reading all "
        f"before it. Unpack it to .tar, or make Parquet shards of it (raysl pack)"
    )


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # The old GNU format keeps times where POSIX keeps the front of a long path.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extended(kind: bytes, text: bytes) -> dict[bytes, bytes]:
    """Return what a header says of the file after it."""
    if kind == b"L":
        return {b"path": text.rstrip(b"\0")}
    return _pax(text) if kind == b"x" else {}


def _pax(text: bytes) -> dict[bytes, bytes]:
    """Return the records ``LENGTH KEY=VALUE`` of a POSIX extended header."""
    found = {}
    while match := re.match(rb"(\d+) ([^=]+)=", text):
        length = int(match[1])
        if length <= match.end():
            break
        found[match[2]] = text[match.end() : length - 1]
        text = text[length:]
    return found


class _Samples:
    """Gathers members into samples, and samples into columns."""

    def __init__(self, path: str, config: SourceConfig, ahead: _ReadAhead) -> None:
        self._path, self._config, self._at = path, config, ahead.at
        wanted = (config.image_column,) if config.image_column else IMAGE_SUFFIXES
        self._wanted = {suffix.lstrip(".").lower().encode() for suffix in wanted}
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._names: list[bytes] = []
        self._labels: list[int | str | None] = []
        self._key: bytes | None = None
        self._image: _Member | None = None
        self._label: int | str | None = None
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, member: _Member) -> None:
        folder, slash, base = member.name.rpartition(b"/")
        stem, dot, suffix = base.partition(b".")
        if not (stem and dot):
            return
        key, suffix = folder + slash + stem, suffix.lower()
        if key != self._key:
            self._end_sample()
            self._key = key
        if suffix in self._wanted:
            if self._image is not None:
                raise DataError(
                    f"{self._path}: the sample {readable(key)!r} holds several images "
                    f"({readable(self._image.name)}, {readable(member.name)}); set "
                    f"data.image_column to the suffix of one of them"
                )
            self._image = member
        elif suffix == b"cls" and self._config.label_column is None:
            self._label = _number_or_text(
                self._at(member.offset, member.size).decode(errors="replace")
            )
        elif suffix == b"json" and self._label is None:
            self._label = self._from_json(self._at(member.offset, member.size))

    def _from_json(self, text: bytes) -> int | str | None:
        try:
            values: Any = json.loads(text)
        except ValueError:
            return None  # an image without a label: only the evaluation asks for one
        value = (
            values.get(self._config.label_column or "label") if isinstance(values, dict) else None
        )
        if isinstance(value, bool | float | list | dict):
            return str(value)
        return _number_or_text(value) if isinstance(value, str) else value

    def _end_sample(self) -> None:
        if self._image is not None:
            self._offsets.append(self._image.offset)
            self._sizes.append(self._image.size)
            self._labels.append(self._label)
            self._digest.update(self._image.name + b"\n")
            if self._config.filter:
                self._names.append(self._image.name)
        self._image = self._label = None

    def index(self, size: int) -> ShardIndex:
        self._end_sample()
        offsets = np.array(self._offsets, dtype=np.int64)
        sizes = np.array(self._sizes, dtype=np.int64)
        name = self._path.rsplit("/", 1)[-1]
        for part in (f"{name}:{size}".encode(), offsets.tobytes(), sizes.tobytes()):
            self._digest.update(part)
        integers = all(label is None or isinstance(label, int) for label in self._labels)
        labels = (
            pa.array(self._labels, pa.int64())
            if integers
            else pa.array([None if v is None else str(v) for v in self._labels], pa.large_string())
        )
        names = pa.array(self._names, pa.large_binary()) if self._config.filter else None
        return ShardIndex(self._path, offsets, sizes, labels, names, self._digest.hexdigest())


def _number_or_text(text: str) -> int | str:
    text = text.strip()
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
