"""The work units of a pack: plain functions, called by threads or Ray tasks.

A source with fast random access is read in the shuffled order, a shard at a time
(:func:`write_shard`). A source that is read in groups is shuffled in two passes: each range of
groups is read once, and its rows are written to a bucket, sorted by shard (:func:`write_bucket`);
then the rows of each shard are collected from all buckets (:func:`merge_shard`). A worker holds at
most two shards in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raysl.data.permute import Permutation
from raysl.errors import DataError
from raysl.pack.config import PackConfig
from raysl.pack.folder import BUCKETS, Bad, PackFolder
from raysl.pack.image import Packed, pack_image
from raysl.pack.threads import map_in_threads
from raysl.sources.source import Source

Indices = npt.NDArray[np.int64]
Report = Callable[[int], None]
"""Called with the number of images that were finished since the last call."""

_MIB = 1 << 20
_CHUNK = 32  # images per call of a thread
_FACTS_KEY = b"raysl"  # in the metadata of the footer
_BUCKET_SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("row", pa.int64()),
        ("image", pa.large_binary()),
        ("label", pa.int64()),
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes_in", pa.int64()),
        ("flaw", pa.string()),
    ]
)


class Job(NamedTuple):
    """The common arguments of all units of a pack."""

    config: PackConfig
    output: str
    """Absolute path or URI of the folder."""
    num_images: int
    num_shards: int
    has_labels: bool

    def bounds(self) -> Indices:
        """Return ``(num_shards + 1,)``: the first position of each shard, then the total number."""
        numbers = np.arange(self.num_shards + 1, dtype=np.int64)
        return numbers * self.num_images // self.num_shards

    def shuffled(self, start: int, stop: int) -> Indices:
        """Return a slice of the shuffle: rows by position, and also positions by row.

        The permutation is its own inverse, so both are the same.
        """
        key = np.array([self.config.seed, 0], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        return Permutation(rng, self.num_images)[start:stop]

    def shard_name(self, shard: int) -> str:
        """Return the file name of a shard; names sort like numbers."""
        return f"part-{shard:0{max(5, len(str(self.num_shards - 1)))}d}.parquet"


class Row(NamedTuple):
    """A packed image, before it is written to a shard."""

    position: int
    """Position in the shuffled order."""
    row: int
    """Row of the source."""
    packed: Packed
    label: int
    path: str
    """The image's id, ``row_id`` of the source."""


class ShardFacts(NamedTuple):
    """The facts about a complete shard."""

    shard: int
    size_bytes: int
    rows: list[int]
    """Number of rows of each row group."""
    bytes: list[int]
    """Size of the encoded images of each row group."""
    bytes_in: int
    """Size of the shard's images in the source."""
    bad: list[Bad]
    """The images that were left out."""
    digest: str
    """Digest of images and labels."""


class BucketFacts(NamedTuple):
    """The facts about a bucket."""

    bad: list[Bad]
    """The images that will be left out."""


def bucket_name(unit: int) -> str:
    """Return the path of a bucket below the folder."""
    return f"{BUCKETS}/{unit:05d}.arrow"


def write_shard(
    source: Source, job: Job, shard: int, *, num_threads: int, report: Report
) -> ShardFacts:
    """Read a shard's rows in shuffled order and write the shard."""
    start, stop = job.bounds()[shard : shard + 2].tolist()
    rows, positions = job.shuffled(start, stop), np.arange(start, stop)
    return _write(job, shard, _rows(source, job, rows, positions, num_threads, report))


def write_bucket(
    source: Source,
    job: Job,
    unit: int,
    start: int,
    stop: int,
    *,
    num_threads: int,
    report: Report,
) -> BucketFacts:
    """Read the rows [start, stop) once and write them to a bucket, one record batch per shard.

    Args:
        source: The images.
        job: The common arguments of the pack.
        unit: Number of the bucket.
        start: First row of the source.
        stop: Row after the last one.
        num_threads: Number of threads that decode.
        report: Called with the number of images finished since the last call.
    """
    rows, positions = np.arange(start, stop), job.shuffled(start, stop)
    shards = np.searchsorted(job.bounds(), positions, side="right") - 1
    sorted_rows: list[list[Row]] = [[] for _ in range(job.num_shards)]
    bad = []
    for row, shard in zip(
        _rows(source, job, rows, positions, num_threads, report), shards.tolist(), strict=True
    ):
        sorted_rows[shard].append(row)
        if row.packed.flaw:
            bad.append(Bad(row.row, row.path, row.packed.flaw))
    with PackFolder(job.output).writing(bucket_name(unit)) as stream:
        writer = pa.ipc.new_file(stream, _BUCKET_SCHEMA)
        for shard_rows in sorted_rows:
            writer.write_batch(_to_batch(shard_rows))
        writer.close()
    return BucketFacts(bad)


def merge_shard(
    source: Source, job: Job, shard: int, num_units: int, *, num_threads: int, report: Report
) -> ShardFacts:
    """Collect a shard's rows from all buckets and write the shard; the source is not read."""
    folder = PackFolder(job.output)
    rows: list[Row] = []
    for unit in range(num_units):
        rows += _from_batch(_read_batch(folder, unit, shard))
    rows.sort()
    facts = _write(job, shard, iter(rows))
    report(len(rows))
    return facts


def is_complete_bucket(folder: PackFolder, unit: int, num_shards: int) -> bool:
    """Return whether a bucket can be read; after a power cut, the last ones may be damaged."""
    try:
        with folder.filesystem.open_input_file(f"{folder.root}/{bucket_name(unit)}") as stream:
            bucket = pa.ipc.open_file(stream)
            # A bucket of an earlier version lacks a column.
            has_all_shards = bucket.num_record_batches == num_shards
            return bool(has_all_shards and bucket.schema == _BUCKET_SCHEMA)
    except (OSError, pa.ArrowException):
        return False


def read_facts(folder: PackFolder, job: Job, shard: int) -> ShardFacts | None:
    """Return the facts from the footer of a complete shard; None if it cannot be read."""
    path = f"{folder.root}/{job.shard_name(shard)}"
    try:
        with folder.filesystem.open_input_file(path) as stream:
            size = stream.size()
            footer = pq.read_metadata(stream)
            values = json.loads(footer.metadata[_FACTS_KEY])
            bad = [Bad(int(row), str(row_id), str(reason)) for row, row_id, reason in values["bad"]]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return ShardFacts(shard, size, rows, values["bytes"], values["bytes_in"], bad, values["digest"])


def _rows(
    source: Source, job: Job, rows: Indices, positions: Indices, num_threads: int, report: Report
) -> Iterator[Row]:
    """Yield the packed images of rows, with their positions, in this order."""
    labels = source.labels() if job.has_labels else None

    def pack_chunk(start: int) -> list[Row]:
        part = rows[start : start + _CHUNK]
        encoded = source.read(part)
        return [
            Row(
                position,
                row,
                pack_image(data, job.config),
                -1 if labels is None else int(labels[row]),
                source.row_id(row),
            )
            for row, position, data in zip(
                part.tolist(), positions[start : start + _CHUNK].tolist(), encoded, strict=True
            )
        ]

    starts = range(0, len(rows), _CHUNK)
    for packed_rows in map_in_threads(pack_chunk, starts, num_threads=num_threads):
        yield from packed_rows
        report(len(packed_rows))


def _to_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    columns: list[list[Any]] = [
        [row.position for row in rows],
        [row.row for row in rows],
        [row.packed.image for row in rows],
        [row.label for row in rows],
        [row.path for row in rows],
        [row.packed.width for row in rows],
        [row.packed.height for row in rows],
        [row.packed.bytes_in for row in rows],
        [row.packed.flaw for row in rows],
    ]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, _BUCKET_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_BUCKET_SCHEMA)


def _from_batch(batch: pa.RecordBatch) -> Iterator[Row]:
    for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        position, row, image, label, path, width, height, bytes_in, flaw = values
        yield Row(position, row, Packed(image, width, height, bytes_in, flaw), label, path)


def _read_batch(folder: PackFolder, unit: int, shard: int) -> pa.RecordBatch:
    path = f"{folder.root}/{bucket_name(unit)}"
    try:
        with folder.filesystem.open_input_file(path) as stream:
            return pa.ipc.open_file(stream).get_batch(shard)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; delete it, and the same command writes it again"
        ) from None


def _write(job: Job, shard: int, rows: Iterator[Row]) -> ShardFacts:
    folder = PackFolder(job.output)
    with folder.writing(job.shard_name(shard)) as stream:
        writer = _ShardWriter(stream, job)
        try:
            for row in rows:
                writer.add(row)
            facts = writer.close(shard)
        except BaseException:
            writer.abandon()
            raise
        return facts._replace(size_bytes=stream.tell())


class _ShardWriter:
    """Writes the rows of a shard in row groups, and its facts into the footer."""

    def __init__(self, stream: pa.NativeFile, job: Job) -> None:
        label = [("label", pa.int64())] if job.has_labels else []
        sizes = [("width", pa.int32()), ("height", pa.int32())]
        self._schema = pa.schema([("image", pa.binary()), *label, ("path", pa.string()), *sizes])
        compression = {name: "NONE" if name == "image" else "ZSTD" for name in self._schema.names}
        # Encoded images do not compress, and their statistics and dictionaries slow down readers.
        others = [name for name in self._schema.names if name != "image"]
        self._writer = pq.ParquetWriter(
            stream,
            self._schema,
            compression=compression,
            use_dictionary=False,
            write_statistics=others,
        )
        self._group_bytes = job.config.row_group_mib * _MIB
        self._pending: list[Row] = []
        self._pending_bytes = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self._facts = ShardFacts(0, 0, [], [], 0, [], "")
        self._bytes_in = 0

    def add(self, row: Row) -> None:
        """Add the next row; a bad one is only listed."""
        self._bytes_in += row.packed.bytes_in
        if row.packed.flaw:
            self._facts.bad.append(Bad(row.row, row.path, row.packed.flaw))
            return
        self._digest.update(f"{len(row.packed.image)} {row.label} ".encode())
        self._digest.update(row.packed.image)
        self._pending.append(row)
        self._pending_bytes += len(row.packed.image)
        if self._pending_bytes >= self._group_bytes:
            self._flush()

    def close(self, shard: int) -> ShardFacts:
        """Write the remaining rows and the footer, and return the facts."""
        if self._pending:
            self._flush()
        digest = self._digest.hexdigest()
        facts = self._facts._replace(shard=shard, bytes_in=self._bytes_in, digest=digest)
        values = {name: getattr(facts, name) for name in ("bytes", "bytes_in", "bad", "digest")}
        self._writer.add_key_value_metadata({_FACTS_KEY: json.dumps(values).encode()})
        self._writer.close()
        return facts

    def abandon(self) -> None:
        """Close the writer of a failed shard: one that is garbage-collected would still write."""
        with suppress(OSError, pa.ArrowException):
            self._writer.close()

    def _flush(self) -> None:
        table = pa.Table.from_batches([_to_batch(self._pending)])
        table = table.select(self._schema.names).cast(self._schema)
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._facts.rows.append(table.num_rows)
        self._facts.bytes.append(self._pending_bytes)
        self._pending, self._pending_bytes = [], 0
