"""Rewrite any source as shuffled Parquet shards; an interrupted pack resumes.

The caller passes the function that runs the units of work, in this process or on Ray. The result
depends on the source, the settings and the seed only, not on the workers or on interruptions. A
worker holds about two shards and one group of the source in memory; the caller almost nothing.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from raysl.errors import DataError
from raysl.pack.config import PackConfig
from raysl.pack.folder import BUCKETS, Bad, PackFolder
from raysl.pack.image import pack_image
from raysl.pack.shards import (
    BucketFacts,
    Job,
    Report,
    ShardFacts,
    bucket_name,
    is_complete_bucket,
    merge_shard,
    read_facts,
    write_bucket,
    write_shard,
)
from raysl.pack.threads import map_in_threads
from raysl.sources.manifest import Manifest, ManifestFile, read_manifest, write_manifest
from raysl.sources.place import absolute_source
from raysl.sources.source import Source, digest

_MIB = 1 << 20
_ESTIMATE_IMAGES = 256
_ESTIMATE_GROUPS = 8
# Relative error of the estimated size, which is from a sample.
_ESTIMATE_ERROR = 0.1

Facts = BucketFacts | ShardFacts
Unit = Callable[..., Facts]
"""A function of :mod:`raysl.pack.shards` that does a part of the work."""
Calls = Sequence[tuple[Any, ...]]
"""For each call of a unit, the arguments in which the calls differ."""


class Runner(Protocol):
    """The interface of a function that runs units."""

    def __call__(
        self,
        function: Unit,
        source: Source,
        job: Job,
        calls: Calls,
        *,
        report: Report,
    ) -> Iterator[Facts]:
        """Yield ``function(source, job, *call, num_threads=..., report=...)`` as calls complete."""
        ...


class CountProgress(Protocol):
    """The interface of a progress display that counts images."""

    def begin(self, what: str, *, total: int, done: int) -> None:
        """Start a count of ``total`` images, of which ``done`` are done."""
        ...

    def advance(self, count: int) -> None:
        """Add ``count`` images that are done."""
        ...

    def note(self, text: str) -> None:
        """Print a message."""
        ...


class PackResult(NamedTuple):
    """The content of a packed folder."""

    images: int
    bad_images: int
    bytes_in: int
    bytes_out: int
    """Size of all shards."""
    shards: int
    fingerprint: str
    """Fingerprint of the packed folder as a source."""
    output: str
    """Absolute path or URI of the folder."""
    complete_before: bool
    """Whether the folder was complete before this call."""


def thread_runner(num_threads: int) -> Runner:
    """Return a function that runs one unit after the other, each in threads of this process."""

    def run(
        function: Unit,
        source: Source,
        job: Job,
        calls: Calls,
        *,
        report: Report,
    ) -> Iterator[Facts]:
        for call in calls:
            yield function(source, job, *call, num_threads=num_threads, report=report)

    return run


def pack(
    source: Source, config: PackConfig, output: str, *, run: Runner, view: CountProgress
) -> PackResult:
    """Pack a source into a folder, or resume an unfinished one.

    Args:
        source: The images.
        config: The settings of the pack.
        output: A local path or a URI such as s3://bucket/folder.
        run: Runs the units of work.
        view: Displays the progress.

    Raises:
        DataError: If the folder belongs to another source or other settings, cannot be written,
            or too many images are bad.
    """
    folder = PackFolder(output)
    folder.refuse_inside(config.source, why="hold its images twice")
    folder.create()
    with folder.locked():
        identity = {"fingerprint": source.fingerprint, **config.lasting()}
        claim = folder.claim()
        if claim is not None:
            holds = "was packed from another source or with other settings"
            folder.refuse_others(claim["wanted"], identity, holds=holds)
            manifest = _manifest(folder)
            if manifest is not None:
                folder.sweep(buckets=True)
                return _result(folder, manifest, complete_before=True)
        else:
            view.note("packing a sample of the images to estimate the number of shards")
            claim = {
                "source": absolute_source(config.source),
                "wanted": identity,
                **_estimate(source, config),
            }
            folder.write_claim(claim)
        folder.sweep()
        has_labels = source.labels() is not None
        num_images = int(source.group_sizes.sum())
        job = Job(config, folder.uri, num_images, claim["shards"], has_labels)
        shards = _Shards(folder, source, job, run, view)
        facts = shards.write(estimate=claim["estimated_bytes"])
        folder.write_bad([bad for shard in facts for bad in shard.bad], name=source.where)
        manifest = _describe(source, job, facts, claim)
        write_manifest(folder.filesystem, folder.root, manifest)
        folder.sweep(buckets=True)
    return _result(folder, manifest, complete_before=False)


def _manifest(folder: PackFolder) -> Manifest | None:
    """Return the manifest of a finished pack, else None."""
    try:
        return read_manifest(folder.filesystem, folder.root)
    except DataError:  # a damaged one is written again from the shards' footers
        return None


def _estimate(source: Source, config: PackConfig) -> dict[str, int]:
    """Estimate the number of shards and their total size by packing a sample of images."""
    rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, 1], np.uint64)))
    sizes = source.group_sizes
    starts = np.cumsum(sizes) - sizes
    groups = np.sort(rng.permutation(len(sizes))[:_ESTIMATE_GROUPS])
    packed_bytes, num_read = 0, 0
    for group in groups.tolist():
        count = min(int(sizes[group]), math.ceil(_ESTIMATE_IMAGES / len(groups)))
        rows = starts[group] + np.sort(rng.choice(int(sizes[group]), count, replace=False))
        encoded = source.read(rows)
        threads = os.cpu_count() or 1
        for packed in map_in_threads(
            partial(pack_image, config=config), encoded, num_threads=threads
        ):
            packed_bytes += len(packed.image)
        num_read += count
    estimate = math.ceil(packed_bytes / max(1, num_read) * int(sizes.sum()))
    shards = max(1, math.ceil(estimate / (config.shard_mib * _MIB)))
    return {"shards": min(shards, int(sizes.sum())), "estimated_bytes": estimate}


class _Shards:
    """Writes the missing shards of a folder."""

    def __init__(
        self, folder: PackFolder, source: Source, job: Job, run: Runner, view: CountProgress
    ) -> None:
        self.folder, self.source, self.job = folder, source, job
        self.run, self.view = run, view

    def write(self, *, estimate: int) -> list[ShardFacts]:
        """Write the missing shards, and return the facts about all shards in order.

        Args:
            estimate: Estimated size of all shards in bytes.
        """
        files = self.folder.file_sizes()
        numbers = [n for n in range(self.job.num_shards) if self.job.shard_name(n) in files]
        footers = {n: read_facts(self.folder, self.job, n) for n in numbers}
        facts = {n: fact for n, fact in footers.items() if fact is not None}
        missing = [n for n in range(self.job.num_shards) if n not in facts]
        in_groups = self.source.window_size is not None
        self._check_room(estimate * len(missing) // self.job.num_shards, in_groups=in_groups)
        if missing:
            calls = self._write_buckets(missing) if in_groups else [(n,) for n in missing]
            bounds = self.job.bounds()
            done = sum(int(bounds[n + 1] - bounds[n]) for n in facts)
            what = "writing shards" if in_groups else "packing"
            self.view.begin(what, total=self.job.num_images, done=done)
            function = merge_shard if in_groups else write_shard
            bad = [entry for fact in facts.values() for entry in fact.bad]
            for shard in self._run(function, calls, bad):
                assert isinstance(shard, ShardFacts)
                facts[shard.shard] = shard
        self._refuse_bad([entry for fact in facts.values() for entry in fact.bad])
        return [facts[n] for n in range(self.job.num_shards)]

    def _write_buckets(self, missing: Sequence[int]) -> list[tuple[Any, ...]]:
        """Write the missing buckets; return the calls that merge them into shards."""
        units = self._units()
        files = self.folder.file_sizes(BUCKETS)
        calls, done = [], 0
        for unit, (start, stop) in enumerate(units):
            name = bucket_name(unit).rpartition("/")[2]
            if name in files and is_complete_bucket(self.folder, unit, self.job.num_shards):
                done += stop - start
            else:
                calls.append((unit, start, stop))
        if calls:
            self.folder.create(BUCKETS)
            self.view.begin("reading", total=self.job.num_images, done=done)
            for _ in self._run(write_bucket, calls, []):
                pass
        return [(n, len(units)) for n in missing]

    def _units(self) -> list[tuple[int, int]]:
        """Cut the source into ranges of whole groups, each about as large as a shard.

        Returns:
            First row of each range, and the row after its last one.
        """
        most = self.job.num_images // self.job.num_shards
        units, start, stop = [], 0, 0
        for size in self.source.group_sizes.tolist():
            if stop > start and stop + size - start > most:
                units.append((start, stop))
                start = stop
            stop += size
        return [*units, (start, stop)]

    def _run(
        self, function: Unit, calls: Iterable[tuple[Any, ...]], bad: list[Bad]
    ) -> Iterator[Facts]:
        """Run units and yield their facts; raise once too many images are bad."""
        for facts in self.run(
            function, self.source, self.job, list(calls), report=self.view.advance
        ):
            bad += facts.bad
            self._refuse_bad(bad)
            yield facts

    def _refuse_bad(self, bad: list[Bad]) -> None:
        self.folder.refuse_bad(
            bad,
            num_images=self.job.num_images,
            most=self.job.config.max_bad_share,
            name=self.source.where,
        )

    def _check_room(self, needed: int, *, in_groups: bool) -> None:
        remark = ""
        if in_groups and self.folder.is_local:
            needed = max(0, 2 * needed - sum(self.folder.file_sizes(BUCKETS).values()))
            remark = " (the shuffle stores the images twice)"
        warning = self.folder.check_room(
            needed, instead="a lower short_side_px or quality", remark=remark, doubt=_ESTIMATE_ERROR
        )
        if warning is not None:
            self.view.note(warning)


def _describe(
    source: Source, job: Job, facts: Sequence[ShardFacts], claim: dict[str, Any]
) -> Manifest:
    files = tuple(
        ManifestFile(
            job.shard_name(fact.shard), fact.size_bytes, tuple(fact.rows), tuple(fact.bytes)
        )
        for fact in facts
    )
    class_names = tuple(source.class_names) if job.has_labels else ()
    bad = sum(len(fact.bad) for fact in facts)
    packed = {
        **claim,
        "bad_images": bad,
        "bytes_in": sum(fact.bytes_in for fact in facts),
    }
    return Manifest(
        images=job.num_images - bad,
        bytes=sum(sum(fact.bytes) for fact in facts),
        fingerprint=digest(*(fact.digest for fact in facts), *class_names),
        image_column="image",
        label_column="label" if job.has_labels else None,
        class_names=class_names,
        files=files,
        packed=packed,
    )


def _result(folder: PackFolder, manifest: Manifest, *, complete_before: bool) -> PackResult:
    return PackResult(
        images=manifest.images,
        bad_images=manifest.packed["bad_images"],
        bytes_in=manifest.packed["bytes_in"],
        bytes_out=sum(file.size_bytes for file in manifest.files),
        shards=len(manifest.files),
        fingerprint=manifest.fingerprint,
        output=folder.uri,
        complete_before=complete_before,
    )
