"""Measure how the memory of a coordinator of Ray Data grows with the blocks that it passes on.

Data workers only make bytes. Executions follow one another, with the bounds of
`raysl/run/ray_bounds.py` and without::

    python docs/studies/ray_coordinator_memory.py --blocks 3000 --kib 16 256
"""

import argparse
import gc
import time
from typing import Any

import numpy as np
import psutil
import ray
from ray.data import ActorPoolStrategy

from raysl.run.ray_bounds import bound_execution
from raysl.run.ray_data import PlanSource, execution_options

PLANNED = 100_000  # blocks; a long run's numbers could be read far ahead
SAMPLES = 6


class MakeBytes:
    """A data worker that returns a block of zeros."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a block of one row."""
        return {"number": batch["number"], "bytes": np.zeros((1, self.size), np.uint8)}


def private_mib(_: Any) -> float:
    """Return the memory of the process that calls this, without what it shares."""
    gc.collect()
    return psutil.Process().memory_full_info().uss / 2**20


def sample(kib: int, *, blocks: int, is_bounded: bool) -> list[float]:
    """Run an execution and return the coordinator's MiB after each sixth of the blocks."""
    numbers = PlanSource(PLANNED)
    dataset = ray.data.read_datasource(
        numbers, override_num_blocks=numbers.num_blocks, num_cpus=0.01, concurrency=1
    ).map_batches(
        MakeBytes,
        fn_constructor_args=(kib << 10,),
        batch_size=1,
        compute=ActorPoolStrategy(size=1),
        num_cpus=0.5,
    )
    dataset.context.execution_options = execution_options()
    if is_bounded:
        bound_execution(dataset.context)
    shard: Any = dataset.streaming_split(1, equal=True)[0]
    found, every = [], blocks // SAMPLES
    for number, _ in enumerate(shard.iter_batches(batch_size=None, prefetch_batches=2), 1):
        if number % every == 0:
            found.append(ray.get(shard._coord_actor.__ray_call__.remote(private_mib)))
        if number == blocks:
            break
    ray.kill(shard._coord_actor)
    time.sleep(5)  # its data workers end
    return found


def main() -> None:
    """Print a line for each size of blocks, with the bounds and without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=3000)
    parser.add_argument("--kib", type=int, nargs="+", default=[16, 256])
    options = parser.parse_args()
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=512 << 20, log_to_driver=False
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    every = options.blocks // SAMPLES
    print(
        "private MiB of the coordinator after",
        *(every * n for n in range(1, SAMPLES + 1)),
        "blocks",
    )
    for kib in options.kib:
        for is_bounded in (False, True):
            found = sample(kib, blocks=options.blocks, is_bounded=is_bounded)
            grown = 1024 * (found[-1] - found[2]) / (every * (SAMPLES - 3))
            print(
                f"blocks of {kib} KiB, {'bounded' if is_bounded else 'as Ray has it'}:",
                *(f"{mib:.0f}" for mib in found),
                f"| {grown:.1f} KiB a block in the second half",
                flush=True,
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
