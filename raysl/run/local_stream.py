"""Make the batches of a run in threads of this process."""

from collections.abc import Iterator
from typing import Any

from raysl.data.stream import ItemMaker, iterate
from raysl.run.recipe import RunConfig, block_spec, plan_of
from raysl.sources.source import Source
from raysl.train.batches import NumpyBatch


def open_local(
    config: RunConfig[Any], source: Source, *, start_step: int, num_threads: int
) -> Iterator[NumpyBatch]:
    """Open the stream of batches from a step on; they are those that Ray's workers would make.

    Args:
        config: The run.
        source: The training images.
        start_step: The first batch is that of this step.
        num_threads: That read, decode and augment.
    """
    return iterate(
        ItemMaker(source, plan_of(config, source), block_spec(config.data)),
        start_step=start_step,
        rank=0,
        world_size=1,
        num_threads=num_threads,
        prefetch_steps=config.cluster.prefetch_batches,
    )
