"""Compute the features of a source's rows in chunks: read, decode, crop, encode.

Ray's actors call the parts; :func:`features_here` puts them together in one process.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from raysl.data.decode import Flaw, decode_or_flaw
from raysl.encoder.file import load_encoder, read_description
from raysl.errors import DataError, DivergedError
from raysl.evaluate.features import square
from raysl.sources.source import Source, digest
from raysl.train.batches import input_converter

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Flaws = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]
Advance = Callable[[int], None]

# The chunk size depends only on the image size, not on the number of workers, so that features are
# bit-identical for any number of workers. 10 MiB of pixels are little for the object store, and
# enough work to hide the 15 ms that Ray Data spends per block.
_CHUNK_BYTES = 10 << 20
_MOST_IMAGES = 256
# float32 pixels per core and forward pass; a larger batch would leave the core's caches.
_FORWARD_BYTES = 5 << 20
_CHANNELS = 3


class EmbeddingSpec(NamedTuple):
    """The encoder, and how images are prepared for it."""

    encoder: str
    """Absolute path of ``encoder.safetensors``; its header contains mean and std."""
    size_px: int
    """Side of the square given to the encoder, S."""
    crop_fraction: float = 1.0
    """Side of the centred square over the shorter side of the image, in (0, 1]."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder's layers; features are always float32."""


class Chunk(NamedTuple):
    """The features of some of the requested rows."""

    positions: Rows
    """Indices into the requested rows, ``(n,)``."""
    features: Features  # (n, D)
    flaws: Flaws
    """``(n,)``: 0, or the :class:`raysl.data.decode.Flaw` of a bad image, encoded as black."""


class ChunkPlan(NamedTuple):
    """The rows to embed, cut into chunks; small enough to send to every worker."""

    rows: Rows | None
    """Row at each position; None: the row equals the position."""
    starts: Rows
    """First position of each chunk."""
    size: int
    """Positions per chunk; a chunk that reaches ``stop`` is shorter."""
    stop: int
    """Total number of positions."""

    def __len__(self) -> int:
        return len(self.starts)

    def positions_of(self, number: int) -> Rows:
        """Return the positions of a chunk; empty for a number past the last chunk."""
        if number >= len(self.starts):
            return np.empty(0, dtype=np.int64)
        start = int(self.starts[number])
        return np.arange(start, min(start + self.size, self.stop), dtype=np.int64)

    def rows_of(self, number: int) -> Rows:
        """Return the rows of a chunk; empty for a number past the last chunk."""
        positions = self.positions_of(number)
        return positions if self.rows is None else self.rows[positions]


def images_per_chunk(size_px: int) -> int:
    """Return the number of images in a chunk, a power of two in [1, 256]."""
    fitting = max(1, _CHUNK_BYTES // (_CHANNELS * size_px**2))
    return min(_MOST_IMAGES, 1 << (fitting.bit_length() - 1))


def cut_rows(rows: Rows, *, size_px: int) -> ChunkPlan:
    """Divide rows into chunks of the size that :func:`images_per_chunk` returns."""
    size = images_per_chunk(size_px)
    return ChunkPlan(rows, np.arange(0, len(rows), size), size, len(rows))


def read_pixels(
    source: Source, rows: Rows, spec: EmbeddingSpec, *, pool: ThreadPoolExecutor | None = None
) -> tuple[Pixels, Flaws]:
    """Read and decode images as :class:`raysl.evaluate.features.EvalImages` does.

    Args:
        source: The source of the images.
        rows: Rows to read, ``(n,)``.
        spec: Size and crop of the images.
        pool: Decoding threads; None decodes in the calling thread.

    Returns:
        ``(n, S, S, 3)`` uint8, with bad images black, and ``(n,)`` flaws.

    Raises:
        DataError: If the source cannot be read.
    """
    size = spec.size_px
    pixels = np.zeros((len(rows), size, size, _CHANNELS), dtype=np.uint8)
    flaws = np.zeros(len(rows), dtype=np.uint8)
    encoded = source.read(rows) if len(rows) else []

    def decode(index: int) -> None:
        image = decode_or_flaw(encoded[index], source.decoding(int(rows[index])))
        if isinstance(image, Flaw):
            flaws[index] = image
        else:
            pixels[index] = square(image, size_px=size, crop_fraction=spec.crop_fraction)

    for _ in (map if pool is None else pool.map)(decode, range(len(rows))):
        pass
    return pixels, flaws


class EncoderRunner:
    """Maps pixels to features with an encoder on a device.

    Args:
        spec: The encoder file, its image size and its precision.
        device: Device that computes.
        num_threads: Number of CPU threads that compute.
        name: File name for error messages; defaults to the file's path.

    Raises:
        DataError: If raysl did not write the encoder file.
    """

    def __init__(
        self,
        spec: EmbeddingSpec,
        *,
        device: torch.device,
        num_threads: int = 1,
        name: str | None = None,
    ) -> None:
        mean, std = normalisation(spec.encoder, name=name)
        self._name = name or spec.encoder
        self._device = device
        network = load_encoder(spec.encoder)
        self._network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._to_input = input_converter(device=device, mean=mean, std=std, channels_last=True)
        self._bf16 = spec.precision == "bf16"
        per_image = 4 * _CHANNELS * spec.size_px**2
        self._batch = max(1, num_threads * _FORWARD_BYTES // per_image)
        self.embed_dim = self._dim(spec.size_px)

    def _dim(self, size_px: int) -> int:
        blank = np.zeros((1, size_px, size_px, _CHANNELS), dtype=np.uint8)
        return int(self(blank).shape[1])

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> Features:
        """Return the features of ``(n, S, S, 3)`` uint8 as ``(n, D)`` float32.

        Raises:
            DataError: If the encoder does not accept images of this size.
            DivergedError: If a feature is not finite.
        """
        if not len(pixels):
            return np.empty((0, self.embed_dim), dtype=np.float32)
        step = len(pixels) if self._device.type == "cuda" else self._batch
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                parts = [
                    self._network(self._to_input(pixels[at : at + step]))
                    for at in range(0, len(pixels), step)
                ]
        except (RuntimeError, AssertionError) as error:  # a ViT of timm asserts its image size
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise DataError(
                f"{self._name}: cannot encode images of {pixels.shape[1]} px: {error}"
            ) from None
        features: Features = torch.cat(parts).float().cpu().numpy()
        if not np.isfinite(features).all():
            raise DivergedError(
                f"{self._name}: returns features that are not finite; its weights are damaged, or "
                f"too large for precision={'bf16' if self._bf16 else 'fp32'}"
            )
        return features


Channels = tuple[float, float, float]


def normalisation(encoder: str | Path, *, name: str | None = None) -> tuple[Channels, Channels]:
    """Return the mean and the standard deviation that normalise an encoder's images.

    Args:
        encoder: Path of ``encoder.safetensors``.
        name: File name for error messages; defaults to the file's path.

    Raises:
        DataError: If the file's header does not contain them.
    """
    description = read_description(encoder)
    statistics = []
    for key in ("mean", "std"):
        values = description.get(key)
        if (
            not isinstance(values, list)
            or len(values) != _CHANNELS
            or not all(isinstance(value, int | float) for value in values)
        ):
            raise DataError(
                f"{name or encoder}: its header has {key}={values!r}, not three numbers: it does "
                f"not say how images are normalised"
            )
        statistics.append((float(values[0]), float(values[1]), float(values[2])))
    return statistics[0], statistics[1]


def features_here(
    source: Source,
    rows: Rows,
    spec: EmbeddingSpec,
    *,
    num_threads: int,
    advance: Advance | None = None,
) -> tuple[Features, dict[int, str]]:
    """Return the features of some rows, computed in this process.

    Args:
        source: The source of the images.
        rows: Rows to embed, ``(M,)``.
        spec: The encoder, and how images are prepared for it.
        num_threads: Number of threads that decode and, without a GPU, compute.
        advance: Called with the number of images embedded since the last call.

    Returns:
        ``(M, D)`` float32 in the order of ``rows``, and the reason of each bad image by its row. A
        bad image is encoded as a black one.

    Raises:
        DataError: If the source or the encoder cannot be read.
        DivergedError: If a feature is not finite.
    """
    chunks = cut_rows(np.asarray(rows, dtype=np.int64), size_px=spec.size_px)
    return collect(
        chunks, stream_here(source, chunks, spec, num_threads=num_threads), advance=advance
    )


def stream_here(
    source: Source, chunks: ChunkPlan, spec: EmbeddingSpec, *, num_threads: int
) -> Generator[Chunk, None, None]:
    """Yield the features of chunks in order, computed in this process."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    with torch_threads(num_threads), ThreadPoolExecutor(num_threads) as pool:
        encode = EncoderRunner(spec, device=device, num_threads=num_threads)
        read = pool_reader(source, chunks, spec, pool=pool, ahead=on_gpu)
        for number, (pixels, flaws) in enumerate(read):
            yield Chunk(chunks.positions_of(number), encode(pixels), flaws)


def pool_reader(
    source: Source,
    chunks: ChunkPlan,
    spec: EmbeddingSpec,
    *,
    pool: ThreadPoolExecutor,
    ahead: bool,
) -> Iterator[tuple[Pixels, Flaws]]:
    """Yield the pixels of chunks in order; ``ahead`` decodes the next one in the background."""

    def read(number: int) -> tuple[Pixels, Flaws]:
        return read_pixels(source, chunks.rows_of(number), spec, pool=pool)

    if not ahead:
        yield from map(read, range(len(chunks)))
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(read, 0)
        for number in range(1, len(chunks) + 1):
            decoded = waiting.result()
            waiting = reader.submit(read, number)  # past the last chunk, this reads no rows
            yield decoded


def collect(
    chunks: ChunkPlan, stream: Iterator[Chunk], *, advance: Advance | None = None
) -> tuple[Features, dict[int, str]]:
    """Join chunks, which may arrive in any order, into features in the order of the rows."""
    features: Features | None = None
    bad: dict[int, str] = {}
    num_received = 0
    for positions, part, flaws in stream:
        if features is None:
            features = np.empty((chunks.stop, part.shape[1]), dtype=np.float32)
        features[positions] = part
        for index in np.flatnonzero(flaws).tolist():
            position = int(positions[index])
            row = position if chunks.rows is None else int(chunks.rows[position])
            bad[row] = Flaw(int(flaws[index])).reason
        num_received += len(part)
        if advance is not None and len(part):
            advance(len(part))
    if features is None:
        raise DataError("no rows to embed: the source or the selection of its rows is empty")
    if num_received != chunks.stop:  # a bug in raysl: every chunk must arrive exactly once
        raise DataError(
            f"{num_received:,} of {chunks.stop:,} features came back; please report this"
        )
    return features, dict(sorted(bad.items()))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads, and restore it on exit."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def encoder_digest(path: Path) -> str:
    """Return 16 hex digits that identify an encoder's weights, mean and standard deviation.

    The bytes of the file do not matter: writing the same encoder again changes its header.
    """
    parts: list[bytes | str] = [repr(normalisation(path))]
    for name, value in sorted(load_encoder(path).state_dict().items()):
        kind = f"{name} {value.dtype} {tuple(value.shape)}"
        parts += [kind, value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
    return digest(*parts)
