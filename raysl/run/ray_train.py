"""Train a run on Ray Train: configure the trainer, and convert its errors."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.config import RunConfig as RayRunConfig

from raysl.errors import ClusterError, ErrorRecord, RayslError, from_record
from raysl.report.terminal import say
from raysl.run.ray_cleaner import OwnClusterCleanerCallback
from raysl.run.ray_cluster import (
    Layout,
    in_background,
    needs_of,
    start_shared_actors,
    started_here,
    worker_runtime_env,
)
from raysl.run.ray_controller import run_controller
from raysl.run.ray_data import RemainingDataset
from raysl.run.ray_errors import folder_error
from raysl.run.ray_group import BatchOptions, ProcessGroupConfig, train_worker
from raysl.run.ray_head import watch_head
from raysl.run.ray_notes import Board, Notes
from raysl.run.ray_scaling import RunFailures, RunScaling, TellWorkers
from raysl.run.ray_stopped import ends_stopped_workers
from raysl.run.ray_streams import EndExecutions, StreamConfig
from raysl.run.ray_validate import evaluator_share
from raysl.run.recipe import RunConfig, block_spec, plan_of
from raysl.run.scaling import Pace
from raysl.run.stop import stops_after_step
from raysl.run.waiting import WaitMessages
from raysl.sources.source import Source
from raysl.track.events import last_hang
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, forget_error, latest_step

_LOOK_EVERY_S = 2.0


def pretrain_on_ray(
    config: RunConfig[Any], *, folder: RunFolder, source: Source, layout: Layout
) -> Results:
    """Train a run on the connected cluster and return its results.

    Raises:
        RayslError: If a worker returned an error; same class and message.
        ClusterError: If workers or the controller failed more often than ``cluster.max_failures``,
            the run waited for longer than ``cluster.max_wait_s``, or Ray itself failed.
        KeyboardInterrupt: If Ctrl-C or SIGTERM stopped it.
    """
    began = time.time()
    forget_error(folder)
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    start_shared_actors()
    is_over = threading.Event()
    head = watch_head(say)
    trainer = _trainer(config, folder=folder, source=source, layout=layout)
    trainer.is_over = lambda: is_over.is_set() or folder.stop.exists()
    trainer.head_answers = head.answers
    notes = Notes(str(folder.path))
    notes.forget()
    notes.write("controller", "waits for Ray Train's controller to start")
    messages = WaitMessages(notes.read, say)
    folder.stop.unlink(missing_ok=True)
    folder.publish(waits=True)
    try:
        beats = Board("beats", str(folder.path))
        watched = ends_stopped_workers(
            folder, beats, limit_s=config.health.max_step_s, head_answers=head.answers
        )
        with stops_after_step(folder.stop.touch), watched:
            # Run `fit` in a thread, so that Ctrl-C interrupts only the wait and the caller
            # disconnects. In the main thread, Ray would end the process with its own error.
            fitting = in_background(trainer.fit, name="raysl-train")
            while not wait([fitting], timeout=_LOOK_EVERY_S).done:
                if not head.answers():
                    continue
                messages.look()
                if folder.stop.exists():  # the handler of a signal only touches the file
                    notes.ask_to_stop()
            try:
                fitted: Any = fitting.result()
            except ray.train.TrainingFailedError as error:  # here, as it may tell of a stop
                hung = last_hang(folder, since=began)
                raise _own_or_cluster_error(error, config, hung=hung) from None
            outcome: Results | ErrorRecord = fitted.return_value
            if "error" in outcome:
                raise from_record(outcome)
            folder.fetch()
    finally:
        is_over.set()
        folder.stop.unlink(missing_ok=True)
        with suppress(ClusterError):
            if head.answers():
                notes.forget()
    return outcome


def _trainer(
    config: RunConfig[Any], *, folder: RunFolder, source: Source, layout: Layout
) -> "_Trainer":
    cluster, needs = config.cluster, needs_of(config, layout)
    source_ref, plan, spec = ray.put(source), plan_of(config, source), block_spec(config.data)
    stored = None if folder.stored is None else folder.stored.for_workers()
    backend = "nccl" if layout.use_gpu else "gloo"
    by_nodes = cluster.is_elastic and cluster.threads_per_train_worker is None
    worker_settings = {
        "config": config.model_dump(mode="json"),
        "folder": str(folder.path),
        "stored": stored,
        "source": source_ref,
        "threads": None if by_nodes else layout.threads_per_train_worker,
        "backend": backend,
        "evaluation": evaluator_share(config, layout),
    }
    batches = BatchOptions(plan.global_batch_size, spec.bytes_per_image, cluster.prefetch_batches)
    newest_step = partial(latest_step, folder.checkpoints) if stored is None else stored.newest_step
    scaling_config = _scaling_config(config, layout)
    most = cluster.max_failures
    failure_config = FailureConfig(max_failures=most, controller_failure_limit=most)
    return _Trainer(
        train_worker,
        policy=RunScaling(
            scaling_config,
            needs=needs,
            num_workers=layout.num_train_workers,
            num_steps=plan.num_steps,
            newest_step=newest_step,
            run=str(folder.path),
            pace=Pace(cluster.resize_every_s),
            max_wait_s=cluster.max_wait_s,
        ),
        failures=RunFailures(
            failure_config, newest_step=newest_step, is_elastic=cluster.is_elastic
        ),
        most_failures=most,
        # Pass a reference: the controller loads this dict, and loading the settings imports torch.
        train_loop_config={
            "settings": ray.put(worker_settings),
            "batches": batches,
            "notes": str(folder.path),
            "roles": needs.roles,
        },
        torch_config=ProcessGroupConfig(backend),
        scaling_config=scaling_config,
        datasets={
            "train": RemainingDataset(source_ref, plan, spec, newest_step=newest_step, needs=needs)
        },
        dataset_config=StreamConfig(str(folder.path), needs.roles),
        run_config=RayRunConfig(
            name="ray",
            # Ray checks that every worker sees this folder, and writes nothing else to it.
            storage_path=str(folder.path) if stored is None else stored.store.root,
            storage_filesystem=None if stored is None else stored.store.filesystem,
            failure_config=failure_config,
            worker_runtime_env=worker_runtime_env(),
        ),
    )


def _scaling_config(config: RunConfig[Any], layout: Layout) -> ScalingConfig:
    counts = config.worker_counts
    resources = {"CPU": layout.cpus_per_train_worker}
    return ScalingConfig(
        num_workers=(counts[0], counts[-1]) if config.cluster.is_elastic else counts[0],
        use_gpu=layout.use_gpu,
        resources_per_worker=resources | ({"GPU": 1} if layout.use_gpu else {}),
        label_selector=config.cluster.train_on,
    )


class _Trainer(TorchTrainer):
    """Ray Train's trainer with the policy of this run.

    Args:
        train_loop: The function that each train worker runs.
        policy: When the train workers start, and how many.
        failures: After which failures they start again.
        most_failures: How often the controller may end early.
        settings: The arguments of TorchTrainer; its dataset ``train`` is a RemainingDataset.

    Attributes:
        is_over: Whether the command ends, so that no other controller may start.
        head_answers: Whether the control store answers; see :mod:`raysl.run.ray_head`.
    """

    def __init__(
        self,
        train_loop: Any,
        *,
        policy: RunScaling,
        failures: RunFailures,
        most_failures: int,
        **settings: Any,
    ) -> None:
        super().__init__(train_loop, **settings)
        self.is_over: Callable[[], bool] = lambda: False
        self.head_answers: Callable[[], bool] = lambda: True
        self._most_failures = most_failures
        self._policies = {"scaling_policy": policy, "failure_policy": failures}

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """Run the controller with this run's policies; Ray chooses among its own."""
        start: Callable[..., Any] = super()._initialize_and_run_controller  # type: ignore[misc]
        return run_controller(
            lambda: start(**{**arguments, **self._policies}),
            most_failures=self._most_failures,
            is_over=self.is_over,
            head_answers=self.head_answers,
            tell=say,
        )

    def _create_default_callbacks(self) -> list[Any]:
        """Tell the dataset how many workers start, and replace Ray's cleaner of placement groups.

        It costs two CPU seconds at the start and is needed only in lasting clusters.
        """
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        callbacks = [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]
        if not started_here():
            callbacks.append(OwnClusterCleanerCallback())
        datasets: Any = self.datasets  # type: ignore[attr-defined] # stubs are of V1
        ends = EndExecutions(self.data_config.run)  # type: ignore[attr-defined]
        return [TellWorkers(datasets["train"]), ends, *callbacks]


def _own_or_cluster_error(
    error: Any, config: RunConfig[Any], *, hung: str | None = None
) -> RayslError:
    """Return raysl's own error of controller or folder, else that workers failed too often."""
    own = getattr(error, "controller_failure", None)
    if isinstance(own, RayslError):
        return own
    if (of_folder := folder_error(error)) is not None:
        return of_folder
    error_by_rank = getattr(error, "worker_failures", None) or {}
    inner = next(iter(error_by_rank.values()), error)
    text = hung or str(inner).strip() or type(inner).__name__
    return ClusterError(
        f"training failed more often than cluster.max_failures={config.cluster.max_failures}; "
        f"last error: {type(inner).__name__}: {text}. The same command resumes from the last "
        f"checkpoint; Ray's own logs are in session_latest/logs/train of its folder, /tmp/ray"
    )
