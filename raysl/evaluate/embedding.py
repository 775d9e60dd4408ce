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

# The size of a chunk depends on the size of the images alone, never on how many workers there are:
# so the features do not either, to the last bit. Some 10 MiB of pixels: nothing for the object
# store, and so much work that Ray Data's 15 ms a block do not count.
_CHUNK_BYTES = 10 << 20
_MOST_IMAGES = 256
# What one core computes at a time stays near its caches: float32 pixels of so many bytes.
_FORWARD_BYTES = 5 << 20
_CHANNELS = 3


class Embedding(NamedTuple):
    """What is done to each image."""

    encoder: str
    """Absolute path of ``encoder.safetensors``; mean and std stand in its header."""
    size_px: int
    """Side of the square given to the encoder, S."""
    crop_fraction: float = 1.0
    """Side of the centred square over the shorter side of the image, in (0, 1]."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder's layers; features are float32 either way."""


class Chunk(NamedTuple):
    """A part of the features."""

    places: Rows
    """Their places among the rows asked for, ``(n,)``."""
    features: Features  # (n, D)
    flaws: Flaws
    """``(n,)``: 0, or the :class:`raysl.data.decode.Flaw` of an image that was shown as black."""


class Chunks(NamedTuple):
    """Which rows are embedded, cut into chunks; small enough to send to every worker."""

    rows: Rows | None
    """Row of each place; None: the place is the row."""
    starts: Rows
    """Place at which each chunk begins."""
    size: int
    """Places of a chunk; less where ``stop`` comes first."""
    stop: int
    """Places in all."""

    def __len__(self) -> int:
        return len(self.starts)

    def places_of(self, number: int) -> Rows:
        """Return the places of a chunk; none of one that lies past the last."""
        if number >= len(self.starts):
            return np.empty(0, dtype=np.int64)
        start = int(self.starts[number])
        return np.arange(start, min(start + self.size, self.stop), dtype=np.int64)

    def rows_of(self, number: int) -> Rows:
        """Return the rows of a chunk, likewise."""
        places = self.places_of(number)
        return places if self.rows is None else self.rows[places]


def chunk_images(size_px: int) -> int:
    """Return the images of a chunk, a power of two in [1, 256]."""
    fitting = max(1, _CHUNK_BYTES // (_CHANNELS * size_px**2))
    return min(_MOST_IMAGES, 1 << (fitting.bit_length() - 1))


def cut_rows(rows: Rows, *, size_px: int) -> Chunks:
    """Cut rows into chunks."""
    size = chunk_images(size_px)
    return Chunks(rows, np.arange(0, len(rows), size), size, len(rows))


def read_pixels(
    source: Source, rows: Rows, embedding: Embedding, *, pool: ThreadPoolExecutor | None = None
) -> tuple[Pixels, Flaws]:
    """Read and decode images as :class:`raysl.evaluate.features.EvalImages` does.

    Args:
        source: Where they are.
        rows: Which, ``(n,)``.
        embedding: Their size and crop.
        pool: Threads that decode; None decodes in this one.

    Returns:
        ``(n, S, S, 3)`` uint8, a bad image black, and ``(n,)`` flaws.

    Raises:
        DataError: If the source cannot be read.
    """
    size = embedding.size_px
    pixels = np.zeros((len(rows), size, size, _CHANNELS), dtype=np.uint8)
    flaws = np.zeros(len(rows), dtype=np.uint8)
    encoded = source.read(rows) if len(rows) else []

    def put(place: int) -> None:
        image = decode_or_flaw(encoded[place], source.decoding(int(rows[place])))
        if isinstance(image, Flaw):
            flaws[place] = image
        else:
            pixels[place] = square(image, size_px=size, crop_fraction=embedding.crop_fraction)

    for _ in (map if pool is None else pool.map)(put, range(len(rows))):
        pass
    return pixels, flaws


class Encode:
    """An encoder on its device: pixels to features.

    Args:
        embedding: Which encoder, and its precision.
        device: Where it computes.
        num_threads: Threads of a CPU that compute.
        name: Of the file in messages; None takes its path.

    Raises:
        DataError: If it is not an encoder that raysl wrote.
    """

    def __init__(
        self,
        embedding: Embedding,
        *,
        device: torch.device,
        num_threads: int = 1,
        name: str | None = None,
    ) -> None:
        mean, std = normalisation(embedding.encoder, name=name)
        self._name = name or embedding.encoder
        self._device = device
        network = load_encoder(embedding.encoder)
        self._network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._to_input = input_converter(device=device, mean=mean, std=std, channels_last=True)
        self._bf16 = embedding.precision == "bf16"
        per_image = 4 * _CHANNELS * embedding.size_px**2
        self._batch = max(1, num_threads * _FORWARD_BYTES // per_image)
        self.embed_dim = self._dim(embedding.size_px)

    def _dim(self, size_px: int) -> int:
        blank = np.zeros((1, size_px, size_px, _CHANNELS), dtype=np.uint8)
        return int(self(blank).shape[1])

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> Features:
        """Return the features of ``(n, S, S, 3)`` uint8 as ``(n, D)`` float32.

        Raises:
            DataError: If the encoder does not take images of this size.
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
                f"{self._name}: gives features that are not finite; its weights are damaged, or "
                f"too large for precision={'bf16' if self._bf16 else 'fp32'}"
            )
        return features


Channels = tuple[float, float, float]


def normalisation(encoder: str | Path, *, name: str | None = None) -> tuple[Channels, Channels]:
    """Return the mean and the standard deviation that an encoder's images are normalised by.

    Args:
        encoder: ``encoder.safetensors``.
        name: Of the file in messages; None takes its path.

    Raises:
        DataError: If its header does not say.
    """
    description = read_description(encoder)
    found = []
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
        found.append((float(values[0]), float(values[1]), float(values[2])))
    return found[0], found[1]


def features_here(
    source: Source,
    rows: Rows,
    embedding: Embedding,
    *,
    num_threads: int,
    advance: Advance | None = None,
) -> tuple[Features, dict[int, str]]:
    """Return the features of some rows, computed in this process.

    Args:
        source: Where the images are.
        rows: Which, ``(M,)``.
        embedding: What is done to them.
        num_threads: Threads that decode, and on a CPU compute; a GPU is used if there is one.
        advance: Called with the number of images done since the last call.

    Returns:
        ``(M, D)`` float32 in the order of ``rows``, and the rows whose images are bad, with the
        reason. A bad image counts as a black one.

    Raises:
        DataError: If the source or the encoder cannot be read.
        DivergedError: If a feature is not finite.
    """
    chunks = cut_rows(np.asarray(rows, dtype=np.int64), size_px=embedding.size_px)
    return collect(
        chunks, stream_here(source, chunks, embedding, num_threads=num_threads), advance=advance
    )


def stream_here(
    source: Source, chunks: Chunks, embedding: Embedding, *, num_threads: int
) -> Generator[Chunk, None, None]:
    """Yield the features of chunks in order, computed in this process."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    with torch_threads(num_threads), ThreadPoolExecutor(num_threads) as pool:
        encode = Encode(embedding, device=device, num_threads=num_threads)
        read = pool_reader(source, chunks, embedding, pool=pool, ahead=on_gpu)
        for number, (pixels, flaws) in enumerate(read):
            yield Chunk(chunks.places_of(number), encode(pixels), flaws)


def pool_reader(
    source: Source,
    chunks: Chunks,
    embedding: Embedding,
    *,
    pool: ThreadPoolExecutor,
    ahead: bool,
) -> Iterator[tuple[Pixels, Flaws]]:
    """Yield the pixels of chunks in order; with ``ahead`` the next one is made meanwhile."""

    def read(number: int) -> tuple[Pixels, Flaws]:
        return read_pixels(source, chunks.rows_of(number), embedding, pool=pool)

    if not ahead:
        yield from map(read, range(len(chunks)))
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(read, 0)
        for number in range(1, len(chunks) + 1):
            made = waiting.result()
            waiting = reader.submit(read, number)  # of the one past the last: nothing
            yield made


def collect(
    chunks: Chunks, made: Iterator[Chunk], *, advance: Advance | None = None
) -> tuple[Features, dict[int, str]]:
    """Put chunks, in whatever order they come, into the order of the rows."""
    features: Features | None = None
    bad: dict[int, str] = {}
    seen = 0
    for places, part, flaws in made:
        if features is None:
            features = np.empty((chunks.stop, part.shape[1]), dtype=np.float32)
        features[places] = part
        for at in np.flatnonzero(flaws).tolist():
            place = int(places[at])
            row = place if chunks.rows is None else int(chunks.rows[place])
            bad[row] = Flaw(int(flaws[at])).reason
        seen += len(part)
        if advance is not None and len(part):
            advance(len(part))
    if features is None:
        raise DataError("no rows to embed: the source, or what was asked of it, is empty")
    if seen != chunks.stop:  # never: each chunk comes once
        raise DataError(f"{seen:,} of {chunks.stop:,} features came back; please report this")
    return features, dict(sorted(bad.items()))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def encoder_digest(path: Path) -> str:
    """Return 16 hex digits that change with an encoder's weights or how it wants its images.

    Not with the bytes of its file: the same encoder, written again, has another header.
    """
    parts: list[bytes | str] = [repr(normalisation(path))]
    for name, value in sorted(load_encoder(path).state_dict().items()):
        kind = f"{name} {value.dtype} {tuple(value.shape)}"
        parts += [kind, value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
    return digest(*parts)
