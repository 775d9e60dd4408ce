"""Time how fast one core makes views, stage by stage."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt

from raysl.data.decode import decode
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec, ItemMaker
from raysl.errors import DecodeError
from raysl.sources.source import Encoded, Source, size_of

_MOST_DECODED = 512  # different images that decoding alone goes round
_MAX_BATCH = 256

READ, DECODE, AUGMENT, TRANSPORT, CONSUMER = "read", "decode", "augment", "transport", "consumer"
STAGES = {
    READ: "reading the source",
    DECODE: "decoding and cropping",
    AUGMENT: "the operations on a view's pixels",
    TRANSPORT: "Ray's transport",
    CONSUMER: "the consumer",
}
# A consumer that waits for less than this share of its time is what the others wait for.
_BUSY_CONSUMER = 0.1


class FunctionTime(NamedTuple):
    """What the data workers' function costs on one core."""

    images_per_s: float
    read_share: float
    decode_share: float  # with the crop and the resize, which decide what has to be decoded
    augment_share: float
    source_bytes_per_image: float


class TimedSource:
    """A source that knows how long reading took and how much it brought."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.seconds = 0.0
        self.num_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Read from the source inside."""
        began = time.perf_counter()
        data = self._source.read(indices)
        self.seconds += time.perf_counter() - began
        self.num_bytes += sum(size_of(d) for d in data)
        return data


def default_batch_size(batch_size_per_worker: int, *, num_images: int, num_consumers: int) -> int:
    """Return a batch for the benchmark: the run's, but small, and half of a small source at most.

    A batch that a small source dictates is rounded to a power of two, so that items divide it.
    """
    most = max(1, num_images // (2 * num_consumers))
    wanted = min(batch_size_per_worker, _MAX_BATCH)
    return wanted if wanted <= most else int(2 ** math.floor(math.log2(most)))


def time_function(
    source: Source, plan: Plan, spec: BlockSpec, *, seconds: float, start: int
) -> FunctionTime:
    """Time the function of the data workers in this process, on one core.

    Each item is made twice: as the run makes it, and with the crops alone; the difference is what
    the operations cost. The first item is not counted: it opens files.

    Args:
        source: Where the images are.
        plan: Their order.
        spec: The views to make.
        seconds: How long to measure; at least one item is made.
        start: Position of the plan to begin at.
    """
    timed = TimedSource(source)
    crops = tuple(view.model_copy(update={"ops": ()}) for view in spec.views)
    make = ItemMaker(cast(Source, timed), plan, spec)
    make_crops = ItemMaker(cast(Source, timed), plan, replace(spec, views=crops))
    make(start % plan.num_items)
    timed.num_bytes = 0
    total = read = cropped = 0.0
    items = 0
    began = time.perf_counter()
    while items == 0 or time.perf_counter() - began < seconds:
        position = (start + 1 + items) % plan.num_items
        whole = _time_item(make, timed, position)
        total, read = total + sum(whole), read + whole[0]
        cropped += _time_item(make_crops, timed, position)[1]
        items += 1
    images = items * plan.item_size
    decode_share = min(cropped, total - read) / total
    return FunctionTime(
        images_per_s=images / total,
        read_share=read / total,
        decode_share=decode_share,
        augment_share=max(0.0, 1 - read / total - decode_share),
        source_bytes_per_image=timed.num_bytes / (2 * images),
    )


def _time_item(make: ItemMaker, source: TimedSource, position: int) -> tuple[float, float]:
    """Return the seconds an item took to read, and otherwise."""
    read_before, began = source.seconds, time.perf_counter()
    make(position)
    elapsed, read = time.perf_counter() - began, source.seconds - read_before
    return read, elapsed - read


def time_whole_items(make: ItemMaker, *, seconds: float, start: int) -> float:
    """Return the images a second of whole items alone; the first is not counted."""
    plan = make.plan
    make(start % plan.num_items)
    items = 0
    began = time.perf_counter()
    while items == 0 or time.perf_counter() - began < seconds:
        make((start + 1 + items) % plan.num_items)
        items += 1
    return items * plan.item_size / (time.perf_counter() - began)


def time_decode(source: Source, *, seconds: float) -> float | None:
    """Return the images a second that one core decodes whole; None where there is no decoding."""
    cv2.setNumThreads(1)
    count = min(_MOST_DECODED, int(source.group_sizes.sum()))
    encoded = source.read(np.arange(count))
    if isinstance(encoded[0], np.ndarray):
        return None
    tried = done = 0
    began = time.perf_counter()
    while tried == 0 or time.perf_counter() - began < seconds:
        with suppress(DecodeError):  # what becomes of bad images is the run's policy, not ours
            row = tried % count
            decode(encoded[row], source.decoding(row), where=source.where(row))
            done += 1
        tried += 1
    return done / (time.perf_counter() - began)


class Cost(NamedTuple):
    """Where the cores' time goes, in core-milliseconds an image."""

    stages: dict[str, float]
    binding: str
    """The stage that a faster stream needs faster."""


def cost_of(
    *,
    cores: float,
    ray_images_per_s: float,
    busy_images_per_s_per_core: float,
    shares: Mapping[str, float],
    wait_share: float,
) -> Cost:
    """Divide what an image costs among the stages, and say which binds.

    Args:
        cores: That make views.
        ray_images_per_s: Through Ray Data, over all cores.
        busy_images_per_s_per_core: Of the function, with all cores at work.
        shares: Of the function's time, by stage.
        wait_share: Of the consumer's time that it waits.
    """
    function_ms = 1000 / busy_images_per_s_per_core
    stages = {stage: share * function_ms for stage, share in shares.items()}
    stages[TRANSPORT] = max(0.0, 1000 * cores / ray_images_per_s - function_ms)
    binding = max(stages, key=lambda stage: stages[stage])
    return Cost(stages, CONSUMER if wait_share < _BUSY_CONSUMER else binding)
