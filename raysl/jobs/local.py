"""A run in this process, without Ray: the same plan, the same pixels, the same loss."""

import os
from typing import Any

import torch

from raysl.data.stream import ItemMaker, iterate
from raysl.evaluate.protocol import LabelledSets
from raysl.jobs.measuring import Place
from raysl.jobs.pretrain import pretrain
from raysl.recipe import RunConfig, making_of, plan_of
from raysl.sources.source import Source
from raysl.track.run_folder import RunFolder, latest_step
from raysl.train.loop import Log


def pretrain_here(
    config: RunConfig[Any],
    *,
    folder: RunFolder,
    source: Source,
    num_cpus: int | None = None,
    evaluated: Log | None = None,
    sets: LabelledSets | None = None,
) -> dict[str, Any]:
    """Train, or go on from the newest checkpoint, with threads of this process making the views.

    Args:
        config: The run.
        folder: Its folder.
        source: The training images.
        num_cpus: Threads of torch, and as many that make views, where the configuration leaves
            them open; None takes all of the machine.
        evaluated: As of :func:`raysl.jobs.pretrain.pretrain`.
        sets: As of the same.

    Returns:
        The results of the run.

    Raises:
        RayslError: As :func:`raysl.jobs.pretrain.pretrain` does.
    """
    cluster = config.cluster
    cpus = num_cpus or os.cpu_count() or 1
    on_gpu = cluster.device != "cpu" and torch.cuda.is_available()
    start_step = latest_step(folder.checkpoints)
    make = ItemMaker(source, plan_of(config, source), making_of(config.data))
    return pretrain(
        config,
        folder=folder,
        source=source,
        place=Place(
            torch.device("cuda" if on_gpu else "cpu"), cluster.threads_per_train_worker or cpus
        ),
        start_step=start_step,
        open_batches=lambda _: iterate(
            make,
            start_step=start_step,
            rank=0,
            world_size=1,
            num_threads=cluster.num_data_workers or cpus,
            prefetch_steps=cluster.prefetch_batches,
        ),
        evaluated=evaluated,
        sets=sets,
    )
