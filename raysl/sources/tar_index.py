"""Index a tar shard from its headers: the offset and the label of each image.

WebDataset's layout: members with equal names up to the first dot of the base name are one sample;
the rest of the name is the member's suffix. Members of a sample need not be adjacent. A leading
``./`` is ignored.
"""

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.sources.formats import IMAGE_SUFFIXES, missing_package
from raysl.sources.lasting import is_lasting
from raysl.sources.source import SourceConfig
from raysl.sources.storage import is_local, readable, why_unread, with_retries
from raysl.sources.tar_members import Flaw, Member, members

# On a disk, one read covers a header and small members after it. On an object store, a request
# takes as long as some MiB of data, so the data between headers are read too.
_LOCAL_READ_BYTES, _REMOTE_READ_BYTES = 8 << 10, 4 << 20
_MAX_ENDS = 10
OTHERS = ""
"""Stands for all rarer suffixes in a ``Tally``."""
# Suffixes of metadata, which are not reported for a sample without an image.
_TEXTS = {"cls", "json", "txt"}
_NO_IMAGE, _DOTTED, _PLAIN = range(3)

MISSING = Flaw("missing", "cannot be read: no such file", may_pass=True)

_Label = int | float | str | list[Any] | dict[str, Any] | None
# For each suffix, the number of the image in the shard, or _NONE for another member.
_Sample = dict[bytes, int]
_NONE = -1


class Tally(NamedTuple):
    """How much of a shard is skipped or used in an unexpected way; counters are by suffix."""

    repeated: int
    """Members with the full name of a later member."""
    hidden: int
    """Images whose names start with a dot."""
    links: int
    """Images that are links."""
    bad_json: int
    """.json members that are not valid JSON."""
    without: int
    """Samples without an image."""
    without_ends: Counter[str]
    """Members of samples without an image."""
    left_out: Counter[str]
    """Images with a dot in their suffix, in a sample that has an image with a plain suffix."""
    one_by_one: Counter[str]
    """Images with a dot in their suffix, several in a sample without a plain suffix."""


class ShardIndex(NamedTuple):
    """The images of one shard, in order; all arrays are ``(num_images,)``."""

    path: str
    offsets: npt.NDArray[np.int64]
    """Offset of each image in the file, in bytes."""
    sizes: npt.NDArray[np.int64]
    labels: pa.Array
    """Integers, floating point numbers, texts, or lists; null for an unlabelled sample."""
    names: pa.Array | None
    """Names of the members, large_binary; None unless requested."""
    digest: str
    tally: Tally
    flaw: Flaw | None
    """The file's flaw, or None."""


def index_shard(
    filesystem: pafs.FileSystem,
    path: str,
    config: SourceConfig,
    *,
    names: bool = False,
    labels: bool = True,
) -> ShardIndex:
    """Index the images of a shard; image data are skipped where that is faster than reading them.

    If several members have the same full name, the last counts, as when tar unpacks them. A sample
    has one image: the member with a plain suffix (``cat.jpg``); without one, the only member that
    ends in an image suffix (``cat.v2.jpg``). If several do (``photo.2021.05.jpg``,
    ``photo.2021.06.jpg``), the dots are part of their names, and each is a separate image.
    ``image_column`` replaces the image suffixes in these rules.

    A label belongs to the image with the same name up to the last dot, else to all images of its
    sample.

    A damaged shard is not an error, because one of ten thousand downloads may be truncated: the
    intact images before the damage are used, and ``flaw`` reports it.

    Args:
        filesystem: The file system of the shard.
        path: Path of an uncompressed tar file.
        config: Settings: ``image_column`` is the suffix of images, ``label_column`` the key of the
            label in a sample's .json; by default, the label is the .cls or the key ``label``.
        names: Whether to return the members' names.
        labels: Whether to return the labels.

    Raises:
        DataError: If its store does not answer, or a sample holds several images and none is
            selected.
    """
    samples, flaw, size = _Samples(path, config, with_labels=labels), None, 0
    try:
        with with_retries(filesystem, lambda: filesystem.open_input_file(path)) as file:
            size = file.size()
            step = _LOCAL_READ_BYTES if is_local(filesystem) else _REMOTE_READ_BYTES
            ahead = _ReadAhead(
                lambda start, count: with_retries(filesystem, lambda: file.read_at(count, start)),
                step,
            )
            for member in members(ahead.at, size):
                if isinstance(member, Flaw):
                    flaw = member
                else:
                    samples.add(member, ahead.at)
    except (OSError, pa.ArrowException) as error:
        if not is_lasting(filesystem, error, path):
            raise DataError(f"{path}: cannot be read: {error}") from None
        flaw = MISSING if isinstance(error, FileNotFoundError) else _unread(error)
    return samples.index(size, flaw, names=names)


def _unread(error: Exception) -> Flaw:
    number = getattr(error, "errno", None)  # pyarrow's message contains the path
    reason = os.strerror(number) if number else "refused"
    kind = f"that cannot be read, or not to the end ({reason})"
    return Flaw(kind, why_unread(error), may_pass=True)


class _ReadAhead:
    """Reads a file forwards, at least ``step`` bytes at a time."""

    def __init__(self, read: Callable[[int, int], bytes], step: int) -> None:
        self._read, self._step = read, step
        self._start, self._buffer = 0, b""

    def at(self, start: int, count: int) -> bytes:
        begin = start - self._start
        if begin < 0 or begin + count > len(self._buffer):
            self._buffer = bytes(self._read(start, max(count, self._step)))
            self._start, begin = start, 0
        return self._buffer[begin : begin + count]


class _Suffix(NamedTuple):
    """The part of a member's base name after its first dot."""

    text: bytes  # one object for all members, to save memory
    end: str  # the part after the last dot, in lower case
    rank: int  # _NO_IMAGE, _DOTTED or _PLAIN


class _Samples:
    """Collects the members of a shard to samples, and the samples to columns."""

    def __init__(self, path: str, config: SourceConfig, *, with_labels: bool) -> None:
        self._path = path
        self._column_key = config.key("image_column")
        self._column = (config.image_column or "").lstrip(".")
        usual = [suffix for suffix in IMAGE_SUFFIXES if not missing_package(suffix)]
        wanted = [self._column] if self._column else [suffix.lstrip(".") for suffix in usual]
        self._wanted = tuple(suffix.lower().encode() for suffix in wanted)
        self._label_key = config.label_column or "label"
        cls = ["cls"] if config.label_column is None else []
        self._label_ends = [*cls, "json"] if with_labels else []
        # By key, the name up to the first dot.
        self._samples: dict[bytes, _Sample] = {}
        self._offsets, self._sizes = array("q"), array("q")
        # By suffix, then by the name before it.
        self._labels: dict[str, dict[bytes, _Label]] = {"cls": {}, "json": {}}
        self._suffixes: dict[bytes, _Suffix] = {}
        self._repeated = self._hidden = self._links = self._bad_json = self._without = 0
        self._without_ends: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._one_by_one: Counter[str] = Counter()

    def add(self, member: Member, at: Callable[[int, int], bytes]) -> None:
        name = member.name.removeprefix(b"./")
        folder, slash, base = name.rpartition(b"/")
        stem, dot, text = base.partition(b".")
        suffix = self._suffixes.get(text) or self._add_suffix(text)
        if not stem or member.is_link:
            self._hidden += suffix.rank > _NO_IMAGE and not stem
            self._links += suffix.rank > _NO_IMAGE and bool(stem)
            return
        key, number = folder + slash + stem, _NONE
        if suffix.rank > _NO_IMAGE:
            number = len(self._offsets)
            self._offsets.append(member.offset)
            self._sizes.append(member.size)
        sample = self._samples.get(key)
        if sample is None:
            sample = self._samples[key] = {}
        elif text in sample:
            self._repeated += 1
        sample[suffix.text] = number
        if dot and suffix.end in self._label_ends:
            owner = key if len(suffix.end) == len(text) else name[: -len(suffix.end) - 1]
            self._add_label(owner, suffix.end, lambda: at(member.offset, member.size))

    def _add_suffix(self, text: bytes) -> _Suffix:
        low = text.lower()
        rank = _PLAIN if low in self._wanted else _NO_IMAGE
        if rank == _NO_IMAGE and any(low.endswith(b"." + wanted) for wanted in self._wanted):
            rank = _DOTTED
        end = readable(low.rpartition(b".")[2]) or "no suffix"
        suffix = _Suffix(text, end, rank)
        return self._suffixes.setdefault(text, suffix)

    def _add_label(self, owner: bytes, end: str, read: Callable[[], bytes]) -> None:
        if end == "cls":
            self._labels[end][owner] = _number_or_text(read().decode(errors="replace"))
        elif owner not in self._labels["cls"]:
            self._labels[end][owner] = self._from_json(read())

    def _from_json(self, text: bytes) -> _Label:
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError):
            self._bad_json += 1
            return None  # unlabelled: only evaluation needs labels
        value = values.get(self._label_key) if isinstance(values, dict) else None
        if isinstance(value, bool) or (isinstance(value, int) and abs(value) > _MOST_INT):
            return str(value)
        return _number_or_text(value) if isinstance(value, str) else value

    def index(self, size: int, flaw: Flaw | None, *, names: bool) -> ShardIndex:
        images = sorted(
            (number, key, text)
            for key, sample in self._samples.items()
            for text, number in self._images(key, sample).items()
        )
        numbers = [number for number, _, _ in images]
        offsets = np.array(self._offsets, dtype=np.int64)[numbers]
        sizes = np.array(self._sizes, dtype=np.int64)[numbers]
        full_names = [self._name(key, text) for _, key, text in images]
        file = self._path.rsplit("/", 1)[-1]
        digest = hashlib.blake2b(digest_size=8)
        digest.update(b"".join(name + b"\n" for name in full_names))
        for part in (f"{file}:{size}".encode(), offsets.tobytes(), sizes.tobytes()):
            digest.update(part)
        return ShardIndex(
            self._path,
            offsets,
            sizes,
            _label_array([self._label(key, text) for _, key, text in images]),
            pa.array(full_names, pa.large_binary()) if names else None,
            digest.hexdigest(),
            self._tally(),
            flaw,
        )

    def _name(self, key: bytes, text: bytes) -> bytes:
        return key + b"." + text

    def _images(self, key: bytes, sample: _Sample) -> _Sample:
        """Return the images of a sample by suffix, and count unexpected cases."""
        images = {text: number for text, number in sample.items() if number != _NONE}
        plain = [text for text in images if self._suffixes[text].rank == _PLAIN]
        if len(plain) > 1:  # .jpg and .JPG: ``image_column`` tells them apart
            exact = [text for text in plain if text == self._column.encode()]
            if not exact:
                raise self._several(key, plain)
            plain = exact
        if plain and len(images) > 1:
            if not self._column:
                self._left_out.update(readable(text) for text in images if text not in plain)
            return {plain[0]: images[plain[0]]}
        if len(images) > 1:
            self._one_by_one.update(map(readable, images))
        if not images:
            ends = {self._suffixes[text].end for text in sample}
            self._without += 1
            self._without_ends.update((ends - _TEXTS) or ends)
        return images

    def _several(self, key: bytes, texts: list[bytes]) -> DataError:
        names = ", ".join(readable(self._name(key, text)) for text in texts)
        return DataError(
            f"{self._path}: the sample {readable(key)!r} holds several images ({names}); set "
            f"{self._column_key} to the suffix of one of them"
        )

    def _label(self, key: bytes, text: bytes) -> _Label:
        owners = (key + b"." + text.rpartition(b".")[0], key) if b"." in text else (key,)
        for owner in owners:
            for end in self._label_ends:
                if (label := self._labels[end].get(owner)) is not None:
                    return label
        return None

    def _tally(self) -> Tally:
        return Tally(
            self._repeated,
            self._hidden,
            self._links,
            self._bad_json,
            self._without,
            keep_commonest(self._without_ends),
            keep_commonest(self._left_out),
            keep_commonest(self._one_by_one),
        )


def keep_commonest(counts: Counter[str]) -> Counter[str]:
    """Sum all but the largest counts as ``OTHERS``, so that sums over many shards stay small."""
    common = Counter(dict(counts.most_common(_MAX_ENDS)))
    if rest := counts.total() - common.total():
        common[OTHERS] += rest
    return common


_MOST_INT = int(np.iinfo(np.int64).max)


def _number_or_text(text: str) -> int | str:
    text = text.strip()
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text


def _label_array(labels: list[_Label]) -> pa.Array:
    """Convert labels to a column of the type that fits them; lists become empty lists."""
    kinds = {type(label) for label in labels if label is not None}
    if kinds & {list, dict}:
        return pa.array([None if label is None else [] for label in labels], pa.list_(pa.string()))
    if float in kinds and kinds <= {int, float}:
        numbers = [None if label is None else float(label) for label in labels]  # type: ignore[arg-type]
        return pa.array(numbers, pa.float64())
    if kinds <= {int}:
        return pa.array(labels, pa.int64())
    return pa.array([None if v is None else str(v) for v in labels], pa.large_string())
