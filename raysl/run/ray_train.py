"""Train a run on Ray Train: the worker function, the dataset factory, restarts and errors."""

import logging
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import DataConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.config import RunConfig as RayRunConfig

from raysl.errors import ClusterError, ErrorRecord, RayslError, from_record, to_record
from raysl.nn.collectives import broadcast_object, rank_and_size
from raysl.run.measuring import Place
from raysl.run.ray_cluster import Layout, in_background, worker_runtime_env
from raysl.run.ray_data import RemainingDataset, execution_options, iterate_shard
from raysl.run.ray_errors import wrapped_errors
from raysl.run.ray_validate import Evaluator, Share, evaluator_share
from raysl.run.recipe import RunConfig, block_spec, plan_of, run_from_values
from raysl.run.worker import pretrain
from raysl.sources.source import Source
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, forget_error, latest_step, read_error, write_error

_ERROR = "error"


def pretrain_on_ray(
    config: RunConfig[Any], *, folder: RunFolder, source: Source, layout: Layout
) -> Results:
    """Train a run on the connected cluster and return its results.

    Raises:
        RayslError: The error that a worker raised, with its class and message.
        ClusterError: If workers failed more often than ``cluster.max_failures``.
    """
    forget_error(folder)
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    trainer = _trainer(config, folder=folder, source=source, layout=layout)
    try:
        # In the main thread Ray handles Ctrl-C itself and ends the process with its own error; in
        # a thread, Ctrl-C interrupts the wait and the caller disconnects from the cluster.
        fitted = in_background(trainer.fit, name="raysl-train").result()
        outcome: Results | ErrorRecord = fitted.return_value  # type: ignore[attr-defined] # of V2
    except ray.train.TrainingFailedError as error:
        raise _as_cluster_error(error, config) from None
    if "error" in outcome:
        raise from_record(outcome)
    return outcome


def _trainer(
    config: RunConfig[Any], *, folder: RunFolder, source: Source, layout: Layout
) -> TorchTrainer:
    reference = ray.put(source)
    resources = {"CPU": layout.cpus_per_train_worker}
    failures = config.cluster.max_failures
    return TorchTrainer(
        _train_worker,  # type: ignore[arg-type] # Train V2 takes a function that returns
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "folder": str(folder.path),
            "source": reference,
            "threads": layout.threads_per_train_worker,
            "evaluation": evaluator_share(config, layout),
        },
        scaling_config=ScalingConfig(
            num_workers=layout.num_train_workers,
            use_gpu=layout.use_gpu,
            resources_per_worker=resources | ({"GPU": 1} if layout.use_gpu else {}),
        ),
        datasets={
            "train": RemainingDataset(
                reference,
                plan_of(config, source),
                block_spec(config.data),
                checkpoints=folder.checkpoints,
                layout=layout,
            )
        },
        dataset_config=DataConfig(execution_options=execution_options()),
        run_config=RayRunConfig(  # type: ignore[arg-type] # typed as V1's
            name="ray",
            storage_path=str(folder.path),
            failure_config=FailureConfig(max_failures=failures, controller_failure_limit=failures),
            worker_runtime_env=worker_runtime_env(),
        ),
    )


def _train_worker(settings: dict[str, Any]) -> Results | ErrorRecord:
    """Run one train worker; return, rather than raise, an error that a restart would not fix.

    Ray Train restarts all workers if one raises. With several workers, an error of this rank is
    written to the run folder and raised, so that Ray stops the other ranks, which wait for this
    one; after the restart every rank returns the written error.
    """
    folder = RunFolder(Path(settings["folder"]))
    if not folder.config.exists():
        raise ClusterError(
            f"node {ray.util.get_node_ip_address()} does not see the run folder {folder.path}: on "
            f"several nodes output_dir must be on a disk that all share"
        )
    written = read_error(folder)
    if written is not None:
        return written
    config = run_from_values(settings["config"], where="the run")
    device = ray.train.torch.get_device()
    start_step = int(broadcast_object(latest_step(folder.checkpoints)))
    share: Share | None = settings["evaluation"]
    _, num_ranks = rank_and_size()
    evaluator = None if share is None else Evaluator(config, share, num_ranks=num_ranks)
    try:
        return pretrain(
            config,
            folder=folder,
            source=ray.get(settings["source"]),
            # Ray may count more CPUs than the machine has.
            place=Place(device, min(settings["threads"], os.cpu_count() or 1)),
            start_step=start_step,
            open_batches=lambda derived: iterate_shard(
                lambda: ray.train.get_dataset_shard("train"),
                batch_size=derived.batch_size_per_worker,
                prefetch_batches=config.cluster.prefetch_batches,
                blocks_per_batch=derived.batch_size_per_worker // derived.item_size,
            ),
            begin=evaluator,
        )
    except (RayslError, ray.exceptions.RayTaskError) as error:
        # A cluster error may not recur after a restart, so it is raised.
        own_error = next(
            (e for e in wrapped_errors(error) if not isinstance(e, ClusterError)), None
        )
        if own_error is None:
            raise
        if rank_and_size()[1] == 1:
            return to_record(own_error)
        write_error(folder, own_error)
        raise
    finally:
        if evaluator is not None:
            evaluator.close()


def _as_cluster_error(error: Any, config: RunConfig[Any]) -> ClusterError:
    failures = getattr(error, "worker_failures", None) or {}
    inner = next(iter(failures.values()), error)
    text = str(inner).strip() or type(inner).__name__
    return ClusterError(
        f"the workers failed more often than cluster.max_failures={config.cluster.max_failures}; "
        f"the last time: {type(inner).__name__}: {text}. The same command resumes from the last "
        f"checkpoint; Ray's own logs are below session_latest/logs/train of its temporary folder"
    )
