"""Train a run in this process, without Ray: the same plan, the same pixels, the same loss."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import torch

from raysl.data.stream import ItemMaker, iterate
from raysl.evaluate.protocol import LabelledSets
from raysl.run.cluster_config import ClusterConfig
from raysl.run.measuring import Place
from raysl.run.recipe import RunConfig, block_spec, plan_of
from raysl.run.stop import ends_when_hung, stops_after_step
from raysl.run.watchdog import OnHang
from raysl.run.worker import pretrain
from raysl.sources.source import Source
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, latest_step
from raysl.train.batches import NumpyBatch
from raysl.train.loop import Log


def uses_gpu(cluster: ClusterConfig) -> bool:
    """Return whether a run in this process trains on a GPU."""
    return cluster.device != "cpu" and torch.cuda.is_available()


def pretrain_here(
    config: RunConfig[Any],
    *,
    folder: RunFolder,
    source: Source,
    num_cpus: int | None = None,
    evaluated: Log | None = None,
    sets: LabelledSets | None = None,
) -> Results:
    """Train, or resume from the newest checkpoint, with views made in threads of this process.

    Args:
        config: The run's configuration.
        folder: The run folder.
        source: The training images.
        num_cpus: Threads of torch, and threads that make views, unless the configuration sets
            them; None uses all CPUs of the machine.
        evaluated: Called with the metrics and the step of each evaluation, after the checkpoint.
        sets: The labelled images of the run, if already open; None opens them.

    Returns:
        The results of the run.

    Raises:
        RayslError: If training fails, as in :func:`raysl.run.worker.pretrain`.
        KeyboardInterrupt: If Ctrl-C or SIGTERM stopped it.
    """
    cluster = config.cluster
    cpus = num_cpus or os.cpu_count() or 1
    start_step = latest_step(folder.checkpoints)
    stop = threading.Event()
    with stops_after_step(stop.set), ends_when_hung() as hung:
        return pretrain(
            config,
            folder=folder,
            source=source,
            place=Place(
                torch.device("cuda" if uses_gpu(cluster) else "cpu"),
                cluster.threads_per_train_worker or cpus,
            ),
            start_step=start_step,
            open_batches=lambda: _batches(
                config, source, start_step=start_step, num_threads=cluster.num_data_workers or cpus
            ),
            evaluated=evaluated,
            sets=sets,
            stops=stop.is_set,
            on_hang=OnHang(hung),
        )


def _batches(
    config: RunConfig[Any], source: Source, *, start_step: int, num_threads: int
) -> Iterator[NumpyBatch]:
    """Yield the batches from ``start_step`` on, the same that Ray's workers would make."""
    return iterate(
        ItemMaker(source, plan_of(config, source), block_spec(config.data)),
        start_step=start_step,
        rank=0,
        world_size=1,
        num_threads=num_threads,
        prefetch_steps=config.cluster.prefetch_batches,
    )
