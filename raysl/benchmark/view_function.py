"""Measure the speed at which one core makes views, by stage."""

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

_MAX_DECODED = 512  # images that time_decode decodes repeatedly
_MAX_BATCH = 256

READ, DECODE, AUGMENT, TRANSPORT, CONSUMER = "read", "decode", "augment", "transport", "consumer"
STAGES = {
    READ: "reading the source",
    DECODE: "decoding and cropping",
    AUGMENT: "the operations on a view's pixels",
    TRANSPORT: "Ray's transport",
    CONSUMER: "the consumer",
}
# If the consumer waits for less than this share of its time, it is the slowest stage.
_BUSY_CONSUMER = 0.1


class FunctionTime(NamedTuple):
    """The speed of the data workers' function on one core, and the shares of its stages."""

    images_per_s: float
    read_share: float
    decode_share: float
    """Share of decoding, cropping and resizing: the crop decides which part is decoded."""
    augment_share: float
    source_bytes_per_image: float
    """Bytes read from the source."""


class TimedSource:
    """A wrapper of a source that sums the time of reading and the bytes read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.seconds = 0.0
        self.num_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Encoded]:
        """Read from the wrapped source, and add time and bytes."""
        began = time.perf_counter()
        data = self._source.read(indices)
        self.seconds += time.perf_counter() - began
        self.num_bytes += sum(size_of(d) for d in data)
        return data


def default_batch_size(batch_size_per_worker: int, *, num_images: int, num_consumers: int) -> int:
    """Return the batch size of a benchmark: the run's, at most 256 and half of a consumer's images.

    If the number of images limits it, it is rounded down to a power of two, which items divide.
    """
    most = max(1, num_images // (2 * num_consumers))
    usual = min(batch_size_per_worker, _MAX_BATCH)
    return usual if usual <= most else int(2 ** math.floor(math.log2(most)))


def time_function(
    source: Source, plan: Plan, spec: BlockSpec, *, seconds: float, start: int
) -> FunctionTime:
    """Time the function of the data workers in this process, on one core.

    Each item is made twice: as in the run, and with crops only; the difference is the time of the
    other operations. The first item is not counted, since it opens files.

    Args:
        source: The images.
        plan: The order of the images.
        spec: The views to make.
        seconds: Duration of the measurement; at least one item is made.
        start: First position in the plan.
    """
    timed = TimedSource(source)
    crops = tuple(view.model_copy(update={"ops": ()}) for view in spec.views)
    make = ItemMaker(cast(Source, timed), plan, spec)
    make_crops = ItemMaker(cast(Source, timed), plan, replace(spec, views=crops))
    make(start % plan.num_items)
    timed.num_bytes = 0
    total_s = read_s = cropped_s = 0.0
    items = 0
    began = time.perf_counter()
    while items == 0 or time.perf_counter() - began < seconds:
        position = (start + 1 + items) % plan.num_items
        item_read_s, item_rest_s = _time_item(make, timed, position)
        total_s += item_read_s + item_rest_s
        read_s += item_read_s
        cropped_s += _time_item(make_crops, timed, position)[1]
        items += 1
    images = items * plan.item_size
    decode_share = min(cropped_s, total_s - read_s) / total_s
    return FunctionTime(
        images_per_s=images / total_s,
        read_share=read_s / total_s,
        decode_share=decode_share,
        augment_share=max(0.0, 1 - read_s / total_s - decode_share),
        source_bytes_per_image=timed.num_bytes / (2 * images),  # each item was made twice
    )


def _time_item(make: ItemMaker, source: TimedSource, position: int) -> tuple[float, float]:
    """Return the seconds of reading an item, and of the rest of making it."""
    read_before, began = source.seconds, time.perf_counter()
    make(position)
    elapsed, read = time.perf_counter() - began, source.seconds - read_before
    return read, elapsed - read


def time_whole_items(make: ItemMaker, *, seconds: float, start: int) -> float:
    """Return the images per second of making whole items; the first item is not counted."""
    plan = make.plan
    make(start % plan.num_items)
    items = 0
    began = time.perf_counter()
    while items == 0 or time.perf_counter() - began < seconds:
        make((start + 1 + items) % plan.num_items)
        items += 1
    return items * plan.item_size / (time.perf_counter() - began)


def time_decode(source: Source, *, seconds: float) -> float | None:
    """Return the images per second that one core decodes at full size; None for decoded sources."""
    cv2.setNumThreads(1)
    count = min(_MAX_DECODED, int(source.group_sizes.sum()))
    encoded = source.read(np.arange(count))
    if isinstance(encoded[0], np.ndarray):
        return None
    attempts = decoded = 0
    began = time.perf_counter()
    while attempts == 0 or time.perf_counter() - began < seconds:
        with suppress(DecodeError):  # bad images are not counted
            row = attempts % count
            decode(encoded[row], source.decoding(row), where=source.where(row))
            decoded += 1
        attempts += 1
    return decoded / (time.perf_counter() - began)


class Cost(NamedTuple):
    """The time of each stage, and the slowest stage."""

    stages: dict[str, float]
    """Core-milliseconds per image, by stage."""
    binding: str
    """The stage that limits the speed of the stream."""


def cost_of(
    *,
    cores: float,
    ray_images_per_s: float,
    busy_images_per_s_per_core: float,
    shares: Mapping[str, float],
    wait_share: float,
) -> Cost:
    """Divide the time per image among the stages, and determine the slowest one.

    Args:
        cores: Cores that make views.
        ray_images_per_s: Speed through Ray Data, over all cores.
        busy_images_per_s_per_core: Speed of the function per core while all cores run it.
        shares: Share of the function's time, by stage.
        wait_share: Share of the consumer's time in which it waits.
    """
    function_ms = 1000 / busy_images_per_s_per_core
    stages = {stage: share * function_ms for stage, share in shares.items()}
    stages[TRANSPORT] = max(0.0, 1000 * cores / ray_images_per_s - function_ms)
    binding = max(stages, key=lambda stage: stages[stage])
    return Cost(stages, CONSUMER if wait_share < _BUSY_CONSUMER else binding)
