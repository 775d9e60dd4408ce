"""Select images of tar shards by filter and limit."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from raysl.errors import DataError
from raysl.sources.filter import RowFilter
from raysl.sources.source import SourceConfig, digest, reading_order, spread_rows
from raysl.sources.storage import num_readers, readable, relative_path
from raysl.sources.tar_index import MISSING, ShardIndex, index_shard
from raysl.sources.tar_notes import IndexedShard

# A limit spreads over at least this many shards, if available: a shard often holds one class.
_MIN_SPREAD = 16


class Choice(NamedTuple):
    """The selection from a set of tar shards."""

    shards: list[ShardIndex]
    """The shards, reduced to the selected images, in the files' order."""
    indexed: list[IndexedShard]
    """Facts about each indexed shard, for notes, in the same order."""
    filtered: RowFilter
    """The filter, after its use on all these shards."""


def choose_images(
    filesystem: pafs.FileSystem, files: Sequence[str], config: SourceConfig, root: str
) -> Choice:
    """Select the images of shards that the filter keeps, up to the limit.

    With a limit, indexing stops once enough shards yield enough images; evenly spaced images of
    these are selected.

    Args:
        filesystem: The file system of the shards.
        files: Paths of the shards, in order.
        config: Settings with the filter and the limit.
        root: Folder that row names are relative to.

    Returns:
        The selected images, and facts about the shards for notes.

    Raises:
        DataError: If a shard is missing, its store does not answer, a sample holds several images
            and none is selected, or the filter does not fit the columns.
    """
    order = reading_order(len(files), config.limit)
    filtered = RowFilter(config.filter, where=config.named, key=config.key("filter"))
    selected: list[tuple[int, ShardIndex, IndexedShard]] = []
    rows = used = 0
    indexed = _index_all(filesystem, [files[place] for place in order], config)
    for number, shard in zip(order, indexed, strict=True):
        if shard.flaw == MISSING:
            raise DataError(f"{shard.path}: {shard.flaw.detail}")
        name = relative_path(shard.path, root)
        reduced = _apply_filter(shard, filtered, name)
        facts = IndexedShard(name, len(shard.offsets), shard.tally, shard.flaw)
        selected.append((number, reduced, facts))
        rows += len(reduced.offsets)
        used += len(reduced.offsets) > 0
        if config.limit is not None and rows >= config.limit and used >= _enough(config.limit):
            break
    selected.sort(key=lambda each: each[0])
    chosen = _spread([shard for _, shard, _ in selected], config.limit)
    return Choice(chosen, [each[2] for each in selected], filtered)


def _enough(limit: int) -> int:
    return min(_MIN_SPREAD, limit)


def _index_all(
    filesystem: pafs.FileSystem, files: Sequence[str], config: SourceConfig
) -> Iterator[ShardIndex]:
    readers = num_readers(filesystem)
    # In chunks, because a limit may need only the first shards.
    at_once = 4 * readers if config.limit is None else _MIN_SPREAD
    remaining = iter(files)
    with ThreadPoolExecutor(readers) as pool:
        while chunk := list(islice(remaining, at_once)):
            yield from pool.map(
                lambda path: index_shard(filesystem, path, config, names=bool(config.filter)), chunk
            )


def _apply_filter(shard: ShardIndex, conditions: RowFilter, name: str) -> ShardIndex:
    if not conditions.conditions or shard.names is None:
        return shard
    ids = pa.array(
        [f"{name}/{readable(member)}" for member in shard.names.to_pylist()], pa.string()
    )
    table = pa.table({"path": ids, "row_id": ids, "bytes": shard.sizes})
    rows = np.flatnonzero(conditions.keep(table, where=shard.path))
    # The digest includes the rows: a list file may change under the same name.
    return _take_rows(shard, rows)._replace(names=None, digest=digest(shard.digest, rows.tobytes()))


def _spread(shards: list[ShardIndex], limit: int | None) -> list[ShardIndex]:
    ends = np.cumsum([len(shard.offsets) for shard in shards], dtype=np.int64)
    if limit is None or ends[-1] <= limit:
        return shards
    rows = spread_rows(int(ends[-1]), limit)
    parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    begins = [0, *ends[:-1].tolist()]
    return [
        _take_rows(shard, part - begin)
        for shard, part, begin in zip(shards, parts, begins, strict=True)
    ]


def _take_rows(shard: ShardIndex, rows: npt.NDArray[np.int64]) -> ShardIndex:
    return shard._replace(
        offsets=shard.offsets[rows],
        sizes=shard.sizes[rows],
        labels=shard.labels.take(pa.array(rows)),
    )
