"""Train a run on Ray Train: configure the trainer, and convert its errors."""

import logging
import time
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
    needs_of,
    start_shared_actors,
    started_here,
    worker_runtime_env,
)
from raysl.run.ray_data import RemainingDataset, execution_options
from raysl.run.ray_group import BatchOptions, ProcessGroupConfig, train_worker
from raysl.run.ray_validate import evaluator_share
from raysl.run.recipe import RunConfig, block_spec, derive_for, plan_of
from raysl.run.stop import stops_after_step
from raysl.sources.source import Source
from raysl.track.events import last_hang
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, forget_error


def pretrain_on_ray(
    config: RunConfig[Any], *, folder: RunFolder, source: Source, layout: Layout
) -> Results:
    """Train a run on the connected cluster and return its results.

    Raises:
        RayslError: If a worker returned an error; same class and message.
        ClusterError: If workers failed more often than ``cluster.max_failures``.
        KeyboardInterrupt: If Ctrl-C or SIGTERM stopped it.
    """
    began = time.time()
    forget_error(folder)
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    start_shared_actors()
    trainer = _trainer(config, folder=folder, source=source, layout=layout)
    folder.stop.unlink(missing_ok=True)
    folder.publish(waits=True)
    try:
        with stops_after_step(folder.stop.touch):
            # Run `fit` in a thread, so that Ctrl-C interrupts only the wait and the caller
            # disconnects. In the main thread, Ray would end the process with its own error.
            fitted = in_background(trainer.fit, name="raysl-train").result()
            outcome: Results | ErrorRecord = fitted.return_value  # type: ignore[attr-defined] # V2
            if "error" in outcome:
                raise from_record(outcome)
            folder.fetch()
    except ray.train.TrainingFailedError as error:
        raise _as_cluster_error(error, config, hung=last_hang(folder, since=began)) from None
    finally:
        folder.stop.unlink(missing_ok=True)
    return outcome


def _trainer(
    config: RunConfig[Any], *, folder: RunFolder, source: Source, layout: Layout
) -> TorchTrainer:
    source_ref = ray.put(source)
    stored = None if folder.stored is None else folder.stored.for_workers()
    backend = "nccl" if layout.use_gpu else "gloo"
    worker_settings = {
        "config": config.model_dump(mode="json"),
        "folder": str(folder.path),
        "stored": stored,
        "source": source_ref,
        "threads": layout.threads_per_train_worker,
        "backend": backend,
        "evaluation": evaluator_share(config, layout),
    }
    derived = derive_for(config, source)
    batches = BatchOptions(
        batch_size=derived.batch_size_per_worker,
        prefetch_batches=config.cluster.prefetch_batches,
        blocks_per_batch=derived.batch_size_per_worker // derived.item_size,
    )
    resources = {"CPU": layout.cpus_per_train_worker}
    max_failures = config.cluster.max_failures
    return _TrainerWithoutCleaner(
        train_worker,
        # Pass a reference: the controller loads this dict, and loading the settings imports torch.
        train_loop_config={"settings": ray.put(worker_settings), "batches": batches},
        torch_config=ProcessGroupConfig(backend),  # type: ignore[arg-type] # any BackendConfig works
        scaling_config=ScalingConfig(
            num_workers=layout.num_train_workers,
            use_gpu=layout.use_gpu,
            resources_per_worker=resources | ({"GPU": 1} if layout.use_gpu else {}),
        ),
        datasets={
            "train": RemainingDataset(
                source_ref,
                plan_of(config, source),
                block_spec(config.data),
                checkpoints=folder.checkpoints,
                needs=needs_of(config, layout),
                stored=stored,
            )
        },
        dataset_config=DataConfig(execution_options=execution_options()),
        run_config=RayRunConfig(  # type: ignore[arg-type] # stubs are of V1
            name="ray",
            # Ray checks that every worker sees this folder, and writes nothing else to it.
            storage_path=str(folder.path) if stored is None else stored.store.root,
            storage_filesystem=None if stored is None else stored.store.filesystem,
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=max_failures
            ),
            worker_runtime_env=worker_runtime_env(),
        ),
    )


class _TrainerWithoutCleaner(TorchTrainer):
    def _create_default_callbacks(self) -> list[Any]:
        """Omit Ray's placement group cleaner if this process started the cluster.

        Its actor costs two CPU seconds at the start and is needed only in lasting clusters.
        """
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        if not started_here():
            return callbacks
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]


def _as_cluster_error(error: Any, config: RunConfig[Any], *, hung: str | None) -> ClusterError:
    error_by_rank = getattr(error, "worker_failures", None) or {}
    inner = next(iter(error_by_rank.values()), error)
    text = hung or str(inner).strip() or type(inner).__name__
    return ClusterError(
        f"training failed more often than cluster.max_failures={config.cluster.max_failures}; "
        f"last error: {type(inner).__name__}: {text}. The same command resumes from the last "
        f"checkpoint; Ray's own logs are in session_latest/logs/train of its folder, /tmp/ray"
    )
