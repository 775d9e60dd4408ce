"""Read images from WebDataset shards (tar files)."""

import itertools
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError, counted
from raysl.sources.cache import ByteCache
from raysl.sources.footers import selection_key
from raysl.sources.labels import number_classes
from raysl.sources.lasting import Failures, is_lasting
from raysl.sources.pixels import Decoding
from raysl.sources.source import Encoded, Labels, SourceConfig, Unreadable, digest
from raysl.sources.storage import (
    REMOTE_READERS,
    is_local,
    readable,
    relative_path,
    why_unread,
    with_retries,
)
from raysl.sources.tar_choice import choose_images
from raysl.sources.tar_index import index_shard
from raysl.sources.tar_notes import IndexedShard, tar_notes

_MIB = 1 << 20
_GROUP_BYTES = 8 * _MIB  # size of one read: few requests, little unneeded data
_NAMES_BYTES = 16 * _MIB  # cached member names of recently used shards
_MAX_SHARDS = 1 << 20


class _LostError(Exception):
    """Bytes that the source found when it was opened can no longer be read."""


class _Names(NamedTuple):
    """Offsets and names of the images in a shard, both ``(num_images,)``, sorted by offset."""

    offsets: npt.NDArray[np.int64]
    names: pa.Array


class TarSource:
    """Images of tar shards in the order of the shards' names and of their members.

    Opening reads all headers once; on an object store, this reads most of the shards' bytes
    (``raysl pack`` avoids that). Later reads take whole ranges of about 8 MiB and cache them. The
    source takes 17 bytes per image and stores no names: to name a row, it reads the headers of the
    shard again.

    ``notes`` counts and names shards that are empty, damaged, truncated, compressed, unreadable or
    without images; intact images in them are used. If no image is left, the first problem is raised
    as an error.

    Args:
        config: The source's settings.
        filesystem: The file system of the shards.
        files: Paths of the shards, in order.
        window_mib: MiB of encoded images to hold for shuffling.
        splits: Names of the folder's splits, including this one.
        notes: Notes about other content of the folder.
        root: Folder that row names are relative to; "" takes the common folder of all files.

    Raises:
        DataError: If a shard is missing, its store does not answer, a sample holds several images
            and none is selected, or there are no images.
    """

    def __init__(
        self,
        config: SourceConfig,
        filesystem: pafs.FileSystem,
        files: Sequence[str],
        *,
        window_mib: int,
        splits: Sequence[str] = (),
        notes: Sequence[str] = (),
        root: str = "",
    ) -> None:
        self.name = config.source
        self.filesystem = filesystem
        self.splits = tuple(splits)
        self.label_advice = (
            "give each sample a .cls member or a key `label` in its .json, or set "
            f"{config.key('label_column')} to another key of it; folders in a tar are not classes"
        )
        self._config = config
        self._root = root or posixpath.commonpath([posixpath.dirname(file) for file in files])
        self.weights: npt.NDArray[np.float64] | None = None
        shards, indexed, filtered = choose_images(filesystem, files, config, self._root)
        self.notes = (
            *notes,
            *tar_notes(indexed, key=config.key("image_column")),
            *filtered.notes(),
        )
        self._files = pa.array([shard.path for shard in shards], pa.large_string())
        self.fingerprint = digest(*(s.digest for s in shards), selection_key(config))
        self._offsets = np.concatenate([s.offsets for s in shards] or [np.empty(0, np.int64)])
        self._sizes = np.concatenate([s.sizes for s in shards] or [np.empty(0, np.int64)])
        if len(self._offsets) == 0:
            raise DataError(_no_images(config, files, indexed, self.notes))
        shard = np.repeat(np.arange(len(shards)), [len(s.offsets) for s in shards])
        # A group: images of one shard that start in the same 8 MiB.
        chunk = self._offsets // _GROUP_BYTES
        is_first = (np.diff(shard, prepend=-1) != 0) | (np.diff(chunk, prepend=-1) != 0)
        self._starts = np.append(np.flatnonzero(is_first), len(shard))
        self._shard = shard[self._starts[:-1]].astype(np.int32)
        spans = self._ends(self._starts[1:] - 1) - self._offsets[self._starts[:-1]]
        per_image = max(1, int(spans.sum()) // len(shard))
        self.window_size: int | None = max(1, window_mib * _MIB // per_image)
        # Room for two windows, as for Parquet: an item at their border needs groups of both.
        self._cache: ByteCache[bytes] = ByteCache(2 * window_mib * _MIB)
        self._names: ByteCache[_Names] = ByteCache(_NAMES_BYTES)
        self._failures = Failures()
        self._labels: Labels | None = None
        self.class_names: list[str] = []
        self._number_labels([shard.labels for shard in shards])

    def _number_labels(self, columns: Sequence[pa.Array]) -> None:
        key = self._config.label_column
        if all(column.null_count == len(column) for column in columns):
            if key is not None:
                self.notes += (
                    f"{self._config.key('label_column')}={key}: no .json member has that key",
                )
            return
        classes = number_classes(columns)
        if classes.labels is None:
            what = f"{self._config.key('label_column')}={key or 'label'}"
            self.notes += (f"{what} {classes.note}; the images have no labels",)
        elif classes.names:
            self.class_names = classes.names
            self._labels = classes.labels.astype(np.min_scalar_type(-len(classes.names)))

    def _ends(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.asarray(self._offsets[rows] + self._sizes[rows])

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Number of images in each group of about 8 MiB."""
        return np.diff(self._starts)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the encoded images of these rows.

        If a group cannot be read (missing, truncated, a broken disk), its images are
        ``Unreadable``, and the group is retried after a minute.

        Raises:
            DataError: If a store does not answer.
        """
        rows = np.asarray(indices, dtype=np.int64)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        needed = [int(group) for group in np.unique(groups)]
        if len(needed) > 1 and not is_local(self.filesystem):
            with ThreadPoolExecutor(min(len(needed), REMOTE_READERS)) as pool:
                runs = dict(zip(needed, pool.map(self._group, needed), strict=True))
        else:
            runs = {group: self._group(group) for group in needed}
        begins = self._offsets[rows] - self._offsets[self._starts[groups]]
        ends = begins + self._sizes[rows]
        result: list[Encoded] = []
        for group, begin, end in zip(groups.tolist(), begins.tolist(), ends.tolist(), strict=True):
            run = runs[group]
            result.append(run if isinstance(run, Unreadable) else run[begin:end])
        return result

    def _group(self, group: int) -> bytes | Unreadable:
        if (reason := self._failures.get(group)) is not None:
            return Unreadable(reason)
        try:
            return self._cache.get(group, lambda: self._read_group(group))
        except _LostError as error:
            self._failures.add(group, str(error))
            return Unreadable(str(error))

    def _read_group(self, group: int) -> tuple[bytes, int]:
        path = self._path(group)
        first, last = self._starts[group], self._starts[group + 1] - 1
        start = int(self._offsets[first])
        count = int(self._offsets[last] + self._sizes[last]) - start

        def read() -> bytes:
            with self.filesystem.open_input_file(path) as file:
                return bytes(file.read_at(count, start))

        try:
            run = with_retries(self.filesystem, read)
        except (OSError, pa.ArrowException) as error:
            if is_lasting(self.filesystem, error, path, start=start, count=count):
                raise _LostError(why_unread(error)) from None
            raise DataError(f"{path}: cannot be read at byte {start:,}: {error}") from None
        if len(run) < count:
            raise _LostError(
                f"cut short since the shard was opened: {start + len(run):,} bytes, not "
                f"{start + count:,}"
            )
        return run, count

    def _path(self, group: int) -> str:
        return str(self._files[int(self._shard[group])].as_py())

    def decoding(self, index: int) -> Decoding:
        """Return the decoding settings of the source."""
        return self._config.decoding()

    def row_id(self, index: int) -> str:
        """Name a row SHARD/MEMBER, with the shard's path below the source's folder.

        The first call for a row of a shard reads the shard's headers again, so calls should be in
        row order. If the shard has changed and lacks the member, its byte offset is the name.

        Raises:
            DataError: If a store does not answer.
        """
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, offset = int(self._shard[group]), int(self._offsets[index])
        name = relative_path(self._path(group), self._root)
        names = self._names_of(shard)
        place = int(np.searchsorted(names.offsets, offset))
        if place == len(names.offsets) or names.offsets[place] != offset:
            return f"{name}/byte {offset}"
        return f"{name}/{readable(names.names[place].as_py())}"

    def _names_of(self, shard: int) -> "_Names":
        path = str(self._files[shard].as_py())
        failure_key = "names", shard  # distinct from the keys of groups, which are integers

        def read() -> tuple[_Names, int]:
            index = index_shard(self.filesystem, path, self._config, names=True, labels=False)
            if index.flaw is not None and index.flaw.may_pass:
                raise _LostError(index.flaw.detail)
            names = _Names(index.offsets, index.names)
            return names, names.offsets.nbytes + names.names.nbytes

        if self._failures.get(failure_key) is None:
            try:
                return self._names.get(shard, read)
            except _LostError as error:
                self._failures.add(failure_key, str(error))
        return _Names(np.empty(0, np.int64), pa.array([], pa.large_binary()))

    def where(self, index: int) -> str:
        """Name a row by its shard and the offset of its first byte."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._path(group)} image at byte {self._offsets[index]}"

    def labels(self) -> Labels | None:
        """Return class numbers, -1 for an unlabelled image; None if no image has a label."""
        return None if self._labels is None else self._labels.astype(np.int64)


def _no_images(
    config: SourceConfig,
    files: Sequence[str],
    indexed: Sequence[IndexedShard],
    notes: Sequence[str],
) -> str:
    where = config.named
    if any(shard.num_images for shard in indexed):
        return (
            f"{where}: {config.key('filter')} leaves no image of the tar shards; an image's path "
            f"is SHARD/MEMBER, such as {indexed[0].shard}/0001.jpg"
        )
    flaws = [(path, each.flaw) for path, each in zip(files, indexed, strict=True) if each.flaw]
    if flaws:
        (path, flaw), others = flaws[0], len(flaws) - 1
        more = f". {counted(others, 'other shard')} cannot be read either" if others else ""
        return f"{path}: {flaw.detail}{more}"
    wanted = f".{config.image_column}" if config.image_column else "the suffix of an image"
    more_notes = "".join(f"; {note}" for note in notes)
    return (
        f"{where}: no images in the {counted(len(files), 'tar shard')}: no member ends in "
        f"{wanted}{more_notes}"
    )


def expand_braces(pattern: str, *, setting: str = "data.source") -> list[str]:
    """Return the paths that a path with ``{0000..0099}`` or ``{a,b}`` stands for, in order.

    Numbers are zero-padded to the width of the first number.

    Args:
        pattern: The path with ranges or lists.
        setting: The setting that gives it, for messages.

    Raises:
        DataError: If a range is empty, or there are more than a million paths.
    """
    parts: list[list[str]] = []
    total = 1
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        choices = [piece]
        if match := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece):
            first, last = int(match[1]), int(match[2])
            if last < first or last - first >= _MAX_SHARDS:
                raise DataError(
                    f"{setting}={pattern}: {piece} must ascend, over at most {_MAX_SHARDS:,} shards"
                )
            choices = [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
        elif piece.startswith("{") and piece.endswith("}") and "," in piece:
            choices = piece[1:-1].split(",")
        total *= len(choices)
        if total > _MAX_SHARDS:
            raise DataError(f"{setting}={pattern}: names more than {_MAX_SHARDS:,} shards")
        parts.append(choices)
    return ["".join(chosen) for chosen in itertools.product(*parts)]
