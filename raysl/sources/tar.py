"""WebDataset shards: tar files of images."""

import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.sources.cache import ByteCache
from raysl.sources.folder import files_kept
from raysl.sources.footers import describe_choice
from raysl.sources.labels import number_classes
from raysl.sources.pixels import Decoding
from raysl.sources.source import Encoded, Labels, SourceConfig, digest
from raysl.sources.storage import REMOTE_READERS, is_local, num_readers, patiently
from raysl.sources.tar_index import ShardIndex, index_shard

_MIB = 1 << 20
_GROUP_BYTES = 8 * _MIB  # read at once: few requests, and little in vain
_MOST_SHARDS = 1 << 20


class TarSource:
    """Images of tar shards in the order of the shards' names and of their members.

    The headers are read once, at opening; of an object store that reads most of the shards (so
    ``raysl pack`` pays there). After that, runs of about 8 MiB are read whole and kept while they
    are likely to be asked for again. It takes 17 bytes an image, and no path.

    Args:
        config: What to open.
        filesystem: Where the shards lie.
        files: Their paths, in order.
        window_mib: Encoded images to hold for shuffling.

    Raises:
        DataError: If a shard cannot be read, is damaged, cut short or compressed, or there are no
            images in them.
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
        self.notes = tuple(notes)
        self.splits = tuple(splits)
        self.label_advice = (
            "give each sample a .cls member or a key `label` in its .json, or set "
            "data.label_column to another key of it"
        )
        self._decoding = config.decoding()
        self.weights: npt.NDArray[np.float64] | None = None
        shards = list(
            _first(_filtered(_index_all(filesystem, files, config), config), config.limit)
        )
        self._files = pa.array([shard.path for shard in shards], pa.large_string())
        self.fingerprint = digest(*(s.digest for s in shards), describe_choice(config))
        self._offsets = np.concatenate([s.offsets for s in shards] or [np.empty(0, np.int64)])
        self._sizes = np.concatenate([s.sizes for s in shards] or [np.empty(0, np.int64)])
        if len(self._offsets) == 0:
            raise DataError(_nothing(config, len(files)))
        shard = np.repeat(np.arange(len(shards)), [len(s.offsets) for s in shards])
        # Neighbours of one shard whose images begin in the same stretch of 8 MiB.
        stretch = self._offsets // _GROUP_BYTES
        new = (np.diff(shard, prepend=-1) != 0) | (np.diff(stretch, prepend=-1) != 0)
        self._starts = np.append(np.flatnonzero(new), len(shard))
        self._shard = shard[self._starts[:-1]].astype(np.int32)
        spans = self._ends(self._starts[1:] - 1) - self._offsets[self._starts[:-1]]
        per_image = max(1, int(spans.sum()) // len(shard))
        self.window_size: int | None = max(1, window_mib * _MIB // per_image)
        # Two windows, as of Parquet.
        self._cache: ByteCache[bytes] = ByteCache(2 * window_mib * _MIB)
        self._labels: Labels | None = None
        self.class_names: list[str] = []
        if any(s.labels.null_count < len(s.labels) for s in shards):
            labels, self.class_names, _ = number_classes([s.labels for s in shards])
            assert labels is not None  # the index makes integers or text of them
            self._labels = labels.astype(np.min_scalar_type(-max(1, len(self.class_names))))

    def _ends(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.asarray(self._offsets[rows] + self._sizes[rows])

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        """Images in each run that is read at once."""
        return np.diff(self._starts)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Return the encoded images of these rows.

        Raises:
            DataError: If a shard cannot be read or has been cut short.
        """
        rows = np.asarray(indices, dtype=np.int64)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        asked = [int(group) for group in np.unique(groups)]
        if len(asked) > 1 and not is_local(self.filesystem):
            with ThreadPoolExecutor(min(len(asked), REMOTE_READERS)) as pool:
                runs = dict(zip(asked, pool.map(self._group, asked), strict=True))
        else:
            runs = {group: self._group(group) for group in asked}
        begins = self._offsets[rows] - self._offsets[self._starts[groups]]
        ends = begins + self._sizes[rows]
        return [
            runs[group][begin:end]
            for group, begin, end in zip(
                groups.tolist(), begins.tolist(), ends.tolist(), strict=True
            )
        ]

    def _group(self, group: int) -> bytes:
        return self._cache.get(group, lambda: self._read_group(group))

    def _read_group(self, group: int) -> tuple[bytes, int]:
        path = self._path(group)
        first, last = self._starts[group], self._starts[group + 1] - 1
        start = int(self._offsets[first])
        count = int(self._offsets[last] + self._sizes[last]) - start

        def read() -> bytes:
            with self.filesystem.open_input_file(path) as file:
                return bytes(file.read_at(count, start))

        try:
            run = patiently(self.filesystem, read)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read at byte {start:,}: {error}") from None
        if len(run) < count:
            raise DataError(
                f"{path}: cut short since it was opened: {start + len(run):,} bytes, not "
                f"{start + count:,}"
            )
        return run, count

    def _path(self, group: int) -> str:
        return str(self._files[int(self._shard[group])].as_py())

    def decoding(self, index: int) -> Decoding:
        """Return what the source's settings say of its images."""
        return self._decoding

    def row_id(self, index: int) -> str:
        """Name a row by its shard and member."""
        return self.where(index)

    def where(self, index: int) -> str:
        """Name a row by its shard and its first byte in it."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._path(group)} image at byte {self._offsets[index]}"

    def labels(self) -> Labels | None:
        """Return class numbers, -1 for an image without one; None if none has one."""
        return None if self._labels is None else self._labels.astype(np.int64)


def _index_all(
    filesystem: pafs.FileSystem, files: Sequence[str], config: SourceConfig
) -> Iterator[ShardIndex]:
    readers = num_readers(filesystem)
    waiting = iter(files)
    with ThreadPoolExecutor(readers) as pool:
        # Not all at once: a limit may need only the first.
        while some := list(islice(waiting, 4 * readers)):
            yield from pool.map(lambda path: index_shard(filesystem, path, config), some)


def _filtered(shards: Iterator[ShardIndex], config: SourceConfig) -> Iterator[ShardIndex]:
    for shard in shards:
        if not config.filter or shard.names is None:
            yield shard
            continue
        table = pa.table({"path": shard.names, "bytes": shard.sizes})
        kept = files_kept(table, config.filter, where=shard.path)
        rows = pa.array(kept)
        yield shard._replace(
            offsets=shard.offsets[kept],
            sizes=shard.sizes[kept],
            labels=shard.labels.filter(rows),
            names=None,
        )


def _first(shards: Iterator[ShardIndex], limit: int | None) -> Iterator[ShardIndex]:
    left = limit
    for shard in shards:
        yield shard._replace(
            offsets=shard.offsets[:left],
            sizes=shard.sizes[:left],
            labels=shard.labels.slice(0, left),
        )
        if left is not None:
            left -= min(left, len(shard.offsets))
            if left == 0:
                return


def _nothing(config: SourceConfig, num_files: int) -> str:
    if config.filter:
        return f"data.source={config.source}: data.filter leaves no image of the tar shards"
    wanted = f".{config.image_column}" if config.image_column else "the suffix of an image"
    return (
        f"data.source={config.source}: no images in the {num_files} tar shards: no member has "
        f"{wanted} right after the first dot of its name (001.jpg, not 001.small.jpg)"
    )


def expand_braces(pattern: str) -> list[str]:
    """Return what a path with ``{0000..0099}`` or ``{a,b}`` stands for, in order.

    Numbers are padded with zeros as the first one is.

    Raises:
        DataError: If a range is empty, or it is more than a million paths.
    """
    parts: list[list[str]] = []
    total = 1
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        choices = [piece]
        if match := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece):
            first, last = int(match[1]), int(match[2])
            if last < first or last - first >= _MOST_SHARDS:
                raise DataError(
                    f"data.source={pattern}: {piece} must run upwards, over at most "
                    f"{_MOST_SHARDS:,} shards"
                )
            choices = [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
        elif piece.startswith("{") and piece.endswith("}") and "," in piece:
            choices = piece[1:-1].split(",")
        total *= len(choices)
        if total > _MOST_SHARDS:
            raise DataError(f"data.source={pattern}: is more than {_MOST_SHARDS:,} shards")
        parts.append(choices)
    return ["".join(chosen) for chosen in itertools.product(*parts)]
