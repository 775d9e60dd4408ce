"""Evaluate in parallel to training: one actor measures encoders while the workers continue."""

import os
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysl.evaluate.online import OnlineSets
from raysl.run.measuring import measure_file
from raysl.run.ray_cluster import Layout
from raysl.run.recipe import RunConfig, run_from_values

_NICENESS = 10
_MOST_THREADS = 8
_RESTARTS = 3


class Share(NamedTuple):
    """What an evaluation beside training takes of the cluster."""

    use_gpu: bool
    threads: int


def share_beside(config: RunConfig[Any], layout: Layout) -> Share | None:
    """Return what evaluations take beside a run; None if the train workers do them themselves.

    A GPU that is left over, else processor time that others leave: the actor reserves no CPU, so
    that it never has one that Ray Data waits for, and the system prefers everyone else.
    """
    online = config.evaluate.online
    has_gpu = layout.use_gpu and layout.spare_gpus >= 1
    # Beside GPUs, a CPU may take longer for one evaluation than training does up to the next.
    if online == "blocking" or (online == "auto" and layout.use_gpu and not has_gpu):
        return None
    return Share(has_gpu, min(max(1, layout.spare_cpus), _MOST_THREADS))


class Evaluator:
    """Measures encoders in an actor of its own, one after the other.

    The actor comes up with the first of them, in the train worker that asks; it ends with
    :meth:`close`, and with that worker, however that ends.

    Args:
        config: The run.
        share: What the actor takes.
        num_ranks: Train workers of the run.
    """

    def __init__(self, config: RunConfig[Any], share: Share, *, num_ranks: int) -> None:
        self._config = config
        self._share = share
        self._num_ranks = num_ranks
        self._actor: Any = None

    def __call__(self, path: Path, sets: OnlineSets) -> "Future[Mapping[str, float]]":
        """Begin to measure the encoder in a file."""
        if self._actor is None:
            self._actor = self._start(sets)
        future: Future[Mapping[str, float]] = Future()

        def ended(done: "Future[Any]") -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:  # without Ray's wrapping, whose text is a traceback
                future.set_exception(getattr(error, "cause", None) or error)

        self._actor.measure.remote(str(path)).future().add_done_callback(ended)
        return future

    def close(self) -> None:
        """End the actor."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _start(self, sets: OnlineSets) -> Any:
        # The train workers have theirs by now; another run may have taken the one that was left.
        on_gpu = self._share.use_gpu and ray.available_resources().get("GPU", 0.0) >= 1
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return (
            ray.remote(_Measurer)
            .options(
                num_cpus=0,
                num_gpus=1 if on_gpu else 0,
                # Said in any case: else it would be sought in the train workers' placement group.
                scheduling_strategy="DEFAULT" if on_gpu else here,
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
    """The actor. It keeps the decoded images from one evaluation to the next."""

    def __init__(
        self, config: dict[str, Any], sets: OnlineSets, *, threads: int, num_ranks: int
    ) -> None:
        os.nice(_NICENESS)
        torch.set_num_threads(threads)
        self._config = run_from_values(config, where="the run")
        self._sets = sets
        self._num_ranks = num_ranks
        images = [sets.train, sets.pairs, *([sets.labelled.test] if sets.labelled else [])]
        for each in images:
            each.num_threads = threads
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")

    def measure(self, path: str) -> dict[str, float]:
        """Return the metrics of the encoder in a file."""
        return measure_file(
            Path(path),
            self._sets,
            self._config,
            device=self._device,
            num_ranks=self._num_ranks,
        )
