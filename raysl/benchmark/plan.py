"""Measure memory and start time of the plan, the order of a run's images, over their number.

Each plan is measured in a separate process (``python -m raysl.benchmark.plan``), whose memory is
limited to half of the free memory.
"""

import json
import pickle
import resource
import statistics
import sys
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil

from raysl.benchmark.own_process import run_in_own_process
from raysl.data.plan import Plan
from raysl.errors import DataError, RayslError

KINDS = {
    "shards": "shards of 10,000 images, row groups of 100",
    "folder": "one group, as in an image folder",
}
_GROUP_IMAGES = 100
_IMAGE_BYTES = 110_000  # mean size of ImageNet's images
_WINDOW_BYTES = 512 << 20
_BATCH, _ITEM, _EPOCHS = 4096, 128, 100

_MAX_ITEMS = 50  # timed for a median
_MAX_ITEMS_S = 20.0
_TIMEOUT_S = 900.0


class PlanCost(NamedTuple):
    """Memory and time of a plan; None if it could not be measured."""

    kind: str
    num_images: int
    plan_bytes: int | None
    """Size of the pickled plan, which is sent to each data worker."""
    table_bytes: int | None
    """Size of the pickled sizes of the groups, a part of the plan."""
    build_s: float | None
    """Time to build the plan."""
    first_item_s: float | None
    """Time of the first item."""
    item_in_order_ms: float | None
    """Time of an item after the previous one."""
    item_at_random_ms: float | None
    """Time of an item at a random position, as after a resume."""
    peak_bytes: int | None
    """Peak memory while the plan is built and used, including the sizes of the groups."""
    problem: str | None = None
    """Why it was not measured."""


def group_sizes(kind: str, num_images: int) -> npt.NDArray[np.int64]:
    """Return the number of images in each group of a source of a kind in :data:`KINDS`."""
    if kind == "folder":
        return np.array([num_images], dtype=np.int64)
    sizes = np.full(-(-num_images // _GROUP_IMAGES), _GROUP_IMAGES, dtype=np.int64)
    sizes[-1] = num_images - _GROUP_IMAGES * (len(sizes) - 1)
    return sizes


def build(kind: str, sizes: npt.NDArray[np.int64]) -> Plan:
    """Return the plan of 100 epochs over groups of these sizes, in batches of 4,096."""
    batch = min(_BATCH, int(sizes.sum()))
    return Plan(
        sizes,
        seed=0,
        global_batch_size=batch,
        item_size=_ITEM if batch % _ITEM == 0 else batch,
        num_steps=_EPOCHS * (int(sizes.sum()) // batch),
        window_size=None if kind == "folder" else _WINDOW_BYTES // _IMAGE_BYTES,
    )


def measure(kind: str, num_images: int) -> PlanCost:
    """Measure a plan in this process: first times, then memory, because tracing memory is slow."""
    sizes = group_sizes(kind, num_images)
    began = time.perf_counter()
    plan = build(kind, sizes)
    build_s = time.perf_counter() - began
    plan_bytes = len(pickle.dumps(plan))  # before its caches fill
    first_item_s = _time_item(plan, 0)
    in_order = _median_s(plan, range(1, min(1 + _MAX_ITEMS, plan.num_items)))
    rng = np.random.default_rng(0)
    at_random = _median_s(plan, rng.integers(plan.num_items, size=_MAX_ITEMS).tolist())
    del plan, sizes
    return PlanCost(
        kind,
        num_images,
        plan_bytes,
        len(pickle.dumps(group_sizes(kind, num_images))),
        build_s,
        first_item_s,
        1000 * in_order,
        1000 * at_random,
        _peak_bytes(kind, num_images),
    )


def _time_item(plan: Plan, position: int) -> float:
    began = time.perf_counter()
    plan.item(position)
    return time.perf_counter() - began


def _median_s(plan: Plan, positions: Iterable[int]) -> float:
    """Return the median time of items at some positions; 0 without positions."""
    times: list[float] = []
    for position in positions:
        times.append(_time_item(plan, position))
        if sum(times) > _MAX_ITEMS_S:
            break
    return statistics.median(times) if times else 0.0


def _peak_bytes(kind: str, num_images: int) -> int:
    tracemalloc.start()  # it also counts NumPy's arrays
    try:
        plan = build(kind, group_sizes(kind, num_images))
        for position in (0, 1, plan.num_items // 2, plan.num_items - 1):
            plan.item(position)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measure_in_own_process(kind: str, num_images: int) -> dict[str, Any]:
    """Measure a plan in a separate process, limited to half of the free memory."""
    limit = psutil.virtual_memory().available // 2
    words = (kind, num_images, limit)
    try:
        return run_in_own_process("raysl.benchmark.plan", *words, timeout_s=_TIMEOUT_S)
    except DataError as error:
        return _failed(kind, num_images, str(error))


def _failed(kind: str, num_images: int, problem: str) -> dict[str, Any]:
    nothing = dict.fromkeys(PlanCost._fields)
    return nothing | {"kind": kind, "num_images": num_images, "problem": problem}


def main() -> None:
    """Measure the plan that the arguments name; print one line of JSON."""
    kind, num_images, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        result = measure(kind, num_images)._asdict()
    except MemoryError:
        result = _failed(kind, num_images, f"needs more than {limit / 2**30:.1f} GiB")
    except RayslError as error:
        result = _failed(kind, num_images, str(error))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
