"""Embed a source into a folder of shards; an interrupted embedding resumes.

The caller passes the function that computes the chunks, in this process or on Ray. The shards
depend on the source, the encoder and the settings only, not on the workers or on interruptions.
Two or three unfinished shards are in memory at a time.
"""

import json
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raysl.data.decode import Flaw
from raysl.data.flaw import reason_of
from raysl.embed.config import EmbedConfig
from raysl.embed.shards import (
    BAD_IMAGES,
    ShardPlan,
    ShardRows,
    embeddings_folder,
    read_bad,
    write_shard,
)
from raysl.encoder.file import read_description
from raysl.errors import ConfigError, DataError
from raysl.evaluate.embedding import (
    Chunk,
    ChunkPlan,
    EmbeddingSpec,
    Features,
    encoder_digest,
    images_per_chunk,
    normalisation,
)
from raysl.pack.folder import Bad, PackFolder
from raysl.pack.run import CountProgress
from raysl.sources.pixels import Decoding
from raysl.sources.place import absolute_source
from raysl.sources.source import Source, SourceConfig
from raysl.store.reading import local_copy

_MIB = 1 << 20
_ROW_BYTES = 40  # approximate size of a row without its features
_FILE = "encoder.safetensors"
_DEFAULT_SIZE_PX = 224
# Metadata that is complete only at the end, or that the reader of a single shard does not need.
_NOT_IN_SHARDS = {"settings", "images", "bad_images", "class_names"}
_HOLDS = "holds embeddings of another encoder or source, or with other settings"
_TINY = np.finfo(np.float32).tiny

MakeChunks = Callable[[Source, ChunkPlan, EmbeddingSpec], Generator[Chunk, None, None]]
"""A function that computes chunks, in any order; closing its generator ends the work."""


class EmbedResult(NamedTuple):
    """The content of a folder of embeddings."""

    images: int
    """Images with features."""
    bad_images: int
    """Bad images, which were left out."""
    embed_dim: int
    shards: int
    bytes: int
    """Size of all shards."""
    made: int
    """Images that this call embedded."""
    output: str
    """Absolute path or URI of the folder."""
    complete_before: bool
    """Whether the folder was complete before this call."""


def encoder_file(path_or_run: str) -> Path:
    """Return the absolute path of an encoder file, or of the encoder in a run folder.

    Of an address in a store, it is the path of a local copy.

    Raises:
        ConfigError: If there is no such file.
        DataError: If there is nothing at the address.
    """
    path = local_copy(path_or_run).expanduser().absolute()
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"{path_or_run}: no encoder there; give an encoder file, or a run folder that holds "
            f"{_FILE}, which a run writes at its end"
        )
    return path


def embedding_of(encoder: Path, config: EmbedConfig) -> EmbeddingSpec:
    """Return the settings of the embedding: encoder, size, crop and precision.

    Raises:
        DataError: If the file is not an encoder of raysl, or its header lacks a needed entry.
    """
    normalisation(encoder)
    size = config.size_px or read_description(encoder).get("image_size_px", _DEFAULT_SIZE_PX)
    if not isinstance(size, int) or size <= 0:
        raise DataError(f"{encoder}: its header has image_size_px={size!r}; set size_px")
    return EmbeddingSpec(str(encoder), size, config.crop_fraction, config.precision)


def other_decoding(encoder: Path, config: SourceConfig) -> list[str]:
    """Return a message for each decoding setting that differs from the encoder's training."""
    trained = read_description(encoder).get("decoding")
    if not isinstance(trained, dict):
        return []  # imported, or written before these settings existed
    here = config.model_dump(mode="json", include=set(Decoding._fields))
    return [
        f"{name}={json.dumps(here[name])} here, but the encoder was trained with "
        f"{name}={json.dumps(trained[name])}: its features may be worse"
        for name in here
        if name in trained and trained[name] != here[name]
    ]


def embed_source(
    source: Source,
    encoder: Path,
    config: EmbedConfig,
    output: str,
    *,
    make: MakeChunks,
    view: CountProgress,
    address: str | None = None,
) -> EmbedResult:
    """Embed a source into a folder, or resume an unfinished one.

    Args:
        source: The images.
        encoder: Path of ``encoder.safetensors``.
        config: The settings of the embedding.
        output: A local path or a URI such as s3://bucket/folder.
        make: Computes the chunks.
        view: Displays the progress.
        address: Where later commands find the encoder, if ``encoder`` is a local copy.

    Raises:
        DataError: If the folder belongs to another encoder, source or other settings, cannot be
            written, or too many images are bad.
    """
    embedding = embedding_of(encoder, config)
    identity = _identity(source, encoder, config, embedding)
    folder = embeddings_folder(output)
    folder.refuse_inside(config.source, why="hold features among its images")
    folder.create()
    with folder.locked():
        about = folder.claim()
        if about is None:
            about = {
                "wanted": identity,
                "source": absolute_source(config.source),
                "encoder_path": address or str(encoder),
                "settings": config.model_dump(mode="json"),
                **_encoder_facts(encoder, embedding),
            }
            folder.write_claim(about)
        else:
            folder.refuse_others(about["wanted"], identity, holds=_HOLDS)
        folder.sweep()
        writer = _Writer(source, config, folder, about)
        complete = not writer.missing and "images" in about
        if not complete:
            made = writer.fill(make, embedding, view)
            about = writer.finish()
        sizes = folder.file_sizes()
    return EmbedResult(
        images=about["images"],
        bad_images=about["bad_images"],
        embed_dim=about["embed_dim"],
        shards=writer.plan.num_shards,
        bytes=sum(sizes[writer.plan.name(n)] for n in range(writer.plan.num_shards)),
        made=0 if complete else made,
        output=folder.uri,
        complete_before=complete,
    )


def _identity(
    source: Source, encoder: Path, config: EmbedConfig, embedding: EmbeddingSpec
) -> dict[str, Any]:
    """Return everything that the shards depend on: encoder, images and lasting settings."""
    digest = encoder_digest(encoder)
    lasting = config.lasting() | {"size_px": embedding.size_px}
    return {"encoder": digest, "fingerprint": source.fingerprint, **lasting}


def _encoder_facts(encoder: Path, embedding: EmbeddingSpec) -> dict[str, Any]:
    description = read_description(encoder)
    dim = description.get("embed_dim")
    if not isinstance(dim, int) or dim <= 0:
        raise DataError(f"{encoder}: its header has embed_dim={dim!r}, not a positive integer")
    mean, std = normalisation(encoder)
    return {
        "run": description.get("run"),
        "method": description.get("method"),
        "embed_dim": dim,
        "size_px": embedding.size_px,
        "mean": list(mean),
        "std": list(std),
    }


class _Writer:
    """Writes the missing shards of a folder.

    Args:
        source: The images.
        config: The settings of the embedding.
        folder: The folder of the shards.
        about: The content of its claim.
    """

    def __init__(
        self, source: Source, config: EmbedConfig, folder: PackFolder, about: dict[str, Any]
    ) -> None:
        self.source, self.config, self.folder, self.about = source, config, folder, about
        self.chunk = images_per_chunk(about["size_px"])
        width = about["embed_dim"] * np.dtype(config.store).itemsize
        shard_rows = max(1, int(config.shard_mib * _MIB / width) // self.chunk) * self.chunk
        self.plan = ShardPlan(int(source.group_sizes.sum()), shard_rows)
        files = folder.file_sizes()
        bad_images = {
            shard: read_bad(folder, self.plan.name(shard))
            for shard in range(self.plan.num_shards)
            if self.plan.name(shard) in files
        }
        self.bad = {shard: bad for shard, bad in bad_images.items() if bad is not None}
        self.missing = [n for n in range(self.plan.num_shards) if n not in self.bad]
        labels = source.labels()
        self.labels: npt.NDArray[np.int64] | None = labels
        self._width = width

    def fill(self, make: MakeChunks, embedding: EmbeddingSpec, view: CountProgress) -> int:
        """Write all missing shards; return the number of embedded images."""
        bounds = [self.plan.bounds(shard) for shard in self.missing]
        num_missing = sum(stop - start for start, stop in bounds)
        self.folder.check_room(num_missing * (self._width + _ROW_BYTES), instead="store=float16")
        if not num_missing:
            return 0
        starts = np.concatenate([np.arange(*each, self.chunk, dtype=np.int64) for each in bounds])
        chunks = ChunkPlan(None, starts, self.chunk, self.plan.num_rows)
        view.begin("embedding", total=self.plan.num_rows, done=self.plan.num_rows - num_missing)
        buffers: dict[int, _ShardBuffer] = {}
        computed = make(self.source, chunks, embedding)
        with closing(computed):
            for chunk in computed:
                for shard in np.unique(chunk.positions // self.plan.shard_rows).tolist():
                    start, stop = self.plan.bounds(shard)
                    buffer = buffers.setdefault(
                        shard, _ShardBuffer(start, stop, dim=self.about["embed_dim"])
                    )
                    buffer.add(chunk)
                    if buffer.num_missing == 0:
                        self._write(shard, buffers.pop(shard))
                view.advance(len(chunk.positions))
        return num_missing

    def finish(self) -> dict[str, Any]:
        """List the bad images and mark the folder as complete."""
        bad = [entry for shard in sorted(self.bad) for entry in self.bad[shard]]
        self.folder.write_bad(bad, name=self.source.where, file=BAD_IMAGES)
        images = self.plan.num_rows - len(bad)
        about = self.about | {
            "images": images,
            "bad_images": len(bad),
            "class_names": list(self.source.class_names),
        }
        if about != self.about:
            self.folder.write_claim(about)
        return about

    def _write(self, shard: int, buffer: "_ShardBuffer") -> None:
        rows = np.arange(buffer.start, buffer.stop, dtype=np.int64)
        good = buffer.flaws == 0
        bad = [
            Bad(row, self.source.row_id(row), reason_of(self.source, row, Flaw(flaw)))
            for row, flaw in zip(rows[~good].tolist(), buffer.flaws[~good].tolist(), strict=True)
        ]
        self.bad[shard] = bad
        self._refuse_bad()
        features = buffer.features[good]
        if self.config.normalize:
            lengths = np.linalg.norm(features, axis=1, keepdims=True)
            features /= np.maximum(lengths, _TINY)
        good_rows = rows[good]
        content = ShardRows(
            [self.source.row_id(row) for row in good_rows.tolist()],
            good_rows,
            None if self.labels is None else self.labels[good_rows].astype(np.int64),
            features,
        )
        about = {k: v for k, v in self.about.items() if k not in _NOT_IN_SHARDS}
        write_shard(
            self.folder,
            self.plan.name(shard),
            content,
            class_names=self.source.class_names,
            store=self.config.store,
            about=about,
            bad=bad,
        )

    def _refuse_bad(self) -> None:
        self.folder.refuse_bad(
            [entry for shard in sorted(self.bad) for entry in self.bad[shard]],
            num_images=self.plan.num_rows,
            most=self.config.max_bad_share,
            name=self.source.where,
            file=BAD_IMAGES,
        )


class _ShardBuffer:
    """The features of a shard whose rows have not all been computed.

    Args:
        start: First row of the shard.
        stop: Row after the last one.
        dim: Features per image.
    """

    def __init__(self, start: int, stop: int, *, dim: int) -> None:
        self.start, self.stop = start, stop
        self.features: Features = np.empty((stop - start, dim), dtype=np.float32)
        self.flaws = np.zeros(stop - start, dtype=np.uint8)
        self._is_filled = np.zeros(stop - start, dtype=np.bool_)
        self.num_missing = stop - start

    def add(self, chunk: Chunk) -> None:
        """Copy the rows of a chunk that belong to this shard."""
        in_shard = (chunk.positions >= self.start) & (chunk.positions < self.stop)
        index = chunk.positions[in_shard] - self.start
        if chunk.features.shape[1] != self.features.shape[1]:
            raise DataError(
                f"the encoder gives {chunk.features.shape[1]} features per image; its header says "
                f"{self.features.shape[1]}"
            )
        self.features[index] = chunk.features[in_shard]
        self.flaws[index] = chunk.flaws[in_shard]
        self._is_filled[index] = True
        self.num_missing = int((~self._is_filled).sum())
