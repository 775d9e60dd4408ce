"""Run one worker of Ray Train, from its settings to its results or its error."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

from raysl.data.block import Block
from raysl.errors import (
    ClusterError,
    ErrorRecord,
    RayslError,
    RunFolderError,
    StoppedError,
    to_record,
)
from raysl.nn.collectives import broadcast_object, rank_and_size
from raysl.run.measuring import Place
from raysl.run.ray_cluster import all_nodes, in_background, threads_for
from raysl.run.ray_errors import wrapped_errors
from raysl.run.ray_notes import Board, Notes
from raysl.run.ray_stopped import beats
from raysl.run.ray_validate import Evaluator, Share
from raysl.run.recipe import run_from_values
from raysl.run.stored import shown_in_errors, start_worker, worker_folder
from raysl.run.watchdog import OnHang
from raysl.run.worker import pretrain
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, read_error, write_error

_LAST_COPY_S = 20.0


def train_worker(settings: dict[str, Any], batches: Iterator[Block]) -> Results | ErrorRecord:
    """Run one train worker; return, rather than raise, an error that a restart would not fix.

    Ray Train restarts all workers if one raises. With several workers, an error of this rank is
    written to the run folder and raised, so that Ray stops the other ranks, which wait for this
    one; after the restart every rank returns the written error.

    Args:
        settings: ``config``, ``folder``, ``stored``, ``source``, ``threads``, ``backend`` and
            ``evaluation``. ``threads`` is None if they follow from the nodes that are there at this
            start.
        batches: This worker's batches from the newest checkpoint on.
    """
    with worker_folder(Path(settings["folder"]), settings["stored"]) as folder:
        return _train(settings, batches, folder)


def _train(
    settings: dict[str, Any], batches: Iterator[Block], folder: RunFolder
) -> Results | ErrorRecord:
    if not folder.config.exists():
        raise ClusterError(
            f"node {ray.util.get_node_ip_address()} does not see the run folder {folder.shown()}: "
            f"on several nodes output_dir must be on a disk that all share, or an address of an "
            f"object store, such as s3://BUCKET/FOLDER"
        )
    written = read_error(folder)
    if written is not None:
        return written
    config = run_from_values(settings["config"], where="the run")
    device = _join_process_group(settings["backend"])
    rank, num_ranks = rank_and_size()
    start_step = start_worker(folder, agreed=lambda own: int(broadcast_object(own)), rank=rank)
    share: Share | None = settings["evaluation"]
    if rank == 0:
        Notes(settings["folder"]).clear()  # the next note waits for the first batch
    on_gpu = settings["backend"] == "nccl"
    nodes = config.cluster.roles.train_nodes(all_nodes(), use_gpu=on_gpu)
    threads = settings["threads"] or threads_for(num_ranks, nodes)
    evaluator = None
    if share is not None:
        sees_files = folder.stored is None
        evaluator = Evaluator(config, share, num_ranks=num_ranks, sees_files=sees_files)
    try:
        beating = beats(
            Board("beats", settings["folder"]), rank=rank, limit_s=config.health.max_step_s
        )
        with shown_in_errors(folder), beating:
            return pretrain(
                config,
                folder=folder,
                source=ray.get(settings["source"]),
                # Ray may count more CPUs than the machine has.
                place=Place(device, min(threads, os.cpu_count() or 1)),
                start_step=start_step,
                open_batches=lambda: batches,
                begin=evaluator,
                stops=folder.stop.exists,
                on_hang=OnHang(lambda text: _end_hung(folder), Board("hangs", settings["folder"])),
            )
    except StoppedError as error:  # on every rank
        return to_record(_published(folder) or error)
    except (RayslError, ray.exceptions.RayTaskError) as error:
        # A cluster error may not recur after a restart, so it is raised.
        own_error = next(
            (e for e in wrapped_errors(error) if not isinstance(e, ClusterError)), None
        )
        if own_error is None:
            raise
        if num_ranks == 1 or own_error.on_every_rank:
            return to_record(own_error)
        write_error(folder, own_error)
        _published(folder)  # if the store is down too, that is not what ended the run
        raise
    finally:
        if evaluator is not None:
            evaluator.close()


def _end_hung(folder: RunFolder) -> None:
    """End this process, whose training hangs; Ray starts all workers again."""
    # The thread that hangs may hold what a copy to a store needs, so it is not waited for long.
    with suppress(TimeoutError):
        in_background(lambda: _published(folder), name="raysl-last-copy").result(_LAST_COPY_S)
    os._exit(1)  # nothing else ends a thread that does not answer


def _published(folder: RunFolder) -> RunFolderError | None:
    """Let other nodes see the last checkpoint; return why they cannot."""
    try:
        folder.publish(waits=True)
    except RunFolderError as error:
        return error
    return None


def _join_process_group(backend: str) -> torch.device:
    """Join the process group of all train workers, and return this worker's device."""
    context = ray.train.get_context()
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(
        backend, context.get_world_rank(), context.get_world_size(), "env://"
    )
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
