"""Train a run on Ray Train: the dataset factory, the workers, restarts and errors."""

import logging
from typing import Any

import ray
import ray.train
from ray.train import DataConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.config import RunConfig as RayRunConfig

from raysl.errors import ClusterError, ErrorRecord, from_record
from raysl.run.ray_cluster import (
    Layout,
    in_background,
    start_shared_actors,
    started_here,
    worker_runtime_env,
)
from raysl.run.ray_data import RemainingDataset, execution_options
from raysl.run.ray_group import BatchShape, ProcessGroupConfig, train_worker
from raysl.run.ray_validate import evaluator_share
from raysl.run.recipe import RunConfig, block_spec, derive_for, plan_of
from raysl.sources.source import Source
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, forget_error


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
    start_shared_actors()
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
    backend = "nccl" if layout.use_gpu else "gloo"
    settings = {
        "config": config.model_dump(mode="json"),
        "folder": str(folder.path),
        "source": reference,
        "threads": layout.threads_per_train_worker,
        "backend": backend,
        "evaluation": evaluator_share(config, layout),
    }
    derived = derive_for(config, source)
    shape = BatchShape(
        batch_size=derived.batch_size_per_worker,
        prefetch_batches=config.cluster.prefetch_batches,
        blocks_per_batch=derived.batch_size_per_worker // derived.item_size,
    )
    resources = {"CPU": layout.cpus_per_train_worker}
    failures = config.cluster.max_failures
    return _Trainer(
        train_worker,
        # A reference, because the controller loads this dict, and the settings' classes need torch.
        train_loop_config={"worker": ray.put(settings), "batches": shape},
        torch_config=ProcessGroupConfig(backend),  # type: ignore[arg-type] # a BackendConfig too
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


class _Trainer(TorchTrainer):
    def _create_default_callbacks(self) -> list[Any]:
        """Leave out what frees the CPUs of a dead controller where the cluster ends with us.

        It is an actor of its own, and each costs two seconds of a core at the start.
        """
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        if not started_here():
            return callbacks
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]


def _as_cluster_error(error: Any, config: RunConfig[Any]) -> ClusterError:
    failures = getattr(error, "worker_failures", None) or {}
    inner = next(iter(failures.values()), error)
    text = str(inner).strip() or type(inner).__name__
    return ClusterError(
        f"the workers failed more often than cluster.max_failures={config.cluster.max_failures}; "
        f"the last time: {type(inner).__name__}: {text}. The same command resumes from the last "
        f"checkpoint; Ray's own logs are below session_latest/logs/train of its temporary folder"
    )
