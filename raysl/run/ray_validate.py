"""Evaluate in parallel to training: one actor evaluates encoders while the workers continue."""

import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysl.evaluate.online import OnlineSets
from raysl.run.measuring import measure_file
from raysl.run.ray_cluster import Layout, nodes_now
from raysl.run.recipe import RunConfig, run_from_values

_NICENESS = 10
_MOST_THREADS = 8
_RESTARTS = 3


class Share(NamedTuple):
    """Resources of the actor that evaluates in parallel to training."""

    use_gpu: bool
    threads: int


def evaluator_share(config: RunConfig[Any], layout: Layout) -> Share | None:
    """Return the resources of the evaluation actor; None if the train workers evaluate.

    The actor uses a spare GPU if there is one, else the CPU. In both cases it runs at low priority
    and reserves no CPU, so that Ray Data never waits for a CPU that the actor holds.
    """
    online = config.evaluate.online
    has_gpu = layout.use_gpu and layout.spare_gpus >= 1
    # If training uses GPUs, evaluations on the CPU may take longer than the training between them.
    if online == "blocking" or (online == "auto" and layout.use_gpu and not has_gpu):
        return None
    return Share(has_gpu, min(max(1, layout.spare_cpus), _MOST_THREADS))


class Evaluator:
    """Evaluates encoders one after the other in its own actor.

    The first call starts the actor. The actor stops on :meth:`close`, or when the train worker that
    started it ends, even by a crash.

    Args:
        config: The run's configuration.
        share: Resources of the actor.
        num_ranks: Number of train workers of the run.
        sees_files: Whether every node sees the files of this worker; else the actor gets their
            content.
    """

    def __init__(
        self, config: RunConfig[Any], share: Share, *, num_ranks: int, sees_files: bool = True
    ) -> None:
        self._sees_files = sees_files
        self._config = config
        self._share = share
        self._num_ranks = num_ranks
        self._actor: Any = None

    def __call__(self, path: Path, sets: OnlineSets) -> "Future[Mapping[str, float]]":
        """Start to evaluate the encoder in a file; return the future of its metrics.

        The actor keeps the ``sets`` of the first call; those of later calls are ignored.
        """
        if self._actor is None:
            self._actor = self._start(sets)
        future: Future[Mapping[str, float]] = Future()

        def copy_outcome(ray_future: "Future[Any]") -> None:
            error = ray_future.exception()
            if error is None:
                future.set_result(ray_future.result())
            else:  # the cause, since the text of Ray's exception is a traceback
                future.set_exception(getattr(error, "cause", None) or error)

        content = None if self._sees_files else path.read_bytes()
        self._actor.measure.remote(str(path), content).future().add_done_callback(copy_outcome)
        return future

    def close(self) -> None:
        """Stop the actor."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _start(self, sets: OnlineSets) -> Any:
        # The train workers hold their GPUs by now, so a GPU still available is a spare one. There
        # is none if another run has taken it.
        roles = self._config.cluster.roles
        on_gpu = self._share.use_gpu and bool(roles.train_nodes(nodes_now().free, use_gpu=True))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return (
            ray.remote(_Measurer)
            .options(
                num_cpus=0,
                num_gpus=1 if on_gpu else 0,
                # Always set, or Ray would place it in the train workers' placement group.
                scheduling_strategy="DEFAULT" if on_gpu else here,
                label_selector=roles.train_on if on_gpu else None,
                max_restarts=_RESTARTS,
                max_task_retries=1,
            )
            .remote(
                self._config.model_dump(mode="json"),
                sets,
                threads=self._share.threads,
                num_ranks=self._num_ranks,
            )
        )


class _Measurer:
    """The actor that evaluates; ``sets`` keeps the decoded images between evaluations."""

    def __init__(
        self, config: dict[str, Any], sets: OnlineSets, *, threads: int, num_ranks: int
    ) -> None:
        os.nice(_NICENESS)
        torch.set_num_threads(threads)
        self._config = run_from_values(config, where="the run")
        self._sets = sets
        self._num_ranks = num_ranks
        image_sets = [sets.train, sets.pairs, *([sets.labelled.test] if sets.labelled else [])]
        for each in image_sets:
            each.num_threads = threads
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")

    def measure(self, path: str, content: bytes | None = None) -> dict[str, float]:
        """Return the metrics of the encoder in the file at ``path``, or in its ``content``."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(path)
            if content is not None:
                file = Path(folder, file.name)
                file.write_bytes(content)
            return measure_file(
                file,
                self._sets,
                self._config,
                device=self._device,
                num_ranks=self._num_ranks,
            )
