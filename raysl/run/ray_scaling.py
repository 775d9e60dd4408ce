"""Start as many train workers as the nodes have room for, in Ray Train's controller.

Ray's own policies do not know that data workers need CPUs as well, that only some numbers of
workers divide a batch, or where the checkpoints are. They start workers that cannot be placed, and
wait without a word. The controller loads this module, so it must not import torch.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.config import FailureConfig, ScalingConfig

from raysl.errors import ClusterError, RunFolderError, StoppedError, counted
from raysl.run.nodes import Node, Nodes
from raysl.run.ray_cluster import ClusterNeeds, layout_for, nodes_now
from raysl.run.ray_data import RemainingDataset
from raysl.run.ray_errors import folder_error
from raysl.run.ray_notes import Notes, data_worker_actors
from raysl.run.scaling import Pace, WorkerCounts, with_held
from raysl.run.waiting import RESIZE, Note, Patience

_POLL_S = 0.5
_PLACE, _START = "place", "start"

# The node of each train worker that Ray Train holds room for, also of dead ones: it gives up the
# room only when the next workers start. Ray passes policy and callback to the controller as
# separate copies, so what the callback is told reaches the policy here.
_held_nodes: list[str] = []


class RunScaling(ScalingPolicy):
    """Ray Train's policy of a run: when its train workers start, and how many.

    Args:
        scaling_config: Ray Train's settings; they hold the resources of a worker.
        needs: What the run asks of the cluster, with device and CPUs of a train worker decided.
        num_workers: Number of train workers of the first layout.
        num_steps: Number of steps of the run.
        newest_step: Returns the step of the newest checkpoint.
        run: The name of the run's notes.
        pace: How soon the number of workers follows the nodes.
        max_wait_s: Longest wait for room or for a first batch; None waits for ever.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        *,
        needs: ClusterNeeds,
        num_workers: int,
        num_steps: int,
        newest_step: Callable[[], int],
        run: str,
        pace: Pace,
        max_wait_s: float | None,
    ) -> None:
        super().__init__(scaling_config)
        self._counts = WorkerCounts(needs, pace, time.monotonic)
        self._num_workers = num_workers
        self._num_steps = num_steps
        self._newest_step = newest_step
        self._patience = Patience(max_wait_s)
        self._notes = Notes(run)
        self._cpus_per_data_worker = 0.0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start the workers if there is room, else wait.

        Raises:
            ClusterError: If this has lasted too long.
            StoppedError: If the run was asked to stop.
        """
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        nodes = nodes_now()
        nodes = nodes._replace(free=self._room(nodes))
        note = Note(_PLACE, self._counts.missing(nodes))
        self._end_if_too_long(note)  # also if there is room: the last start may have found none
        count = self._counts.at_start(nodes)
        if count is None:
            self._notes.write(*note)
            if self._notes.is_to_stop():
                raise StoppedError("stopped while it waited for room for its train workers")
            time.sleep(_POLL_S)
            return NoopDecision()
        return self._resize(count, nodes)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Go on, or start the workers anew because nodes have come or gone.

        Raises:
            ClusterError: If the workers wait for their first batch for too long.
        """
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        self._end_if_too_long(self._notes.read())
        if not self.scaling_config.elasticity_enabled:
            return NoopDecision()
        nodes, current = nodes_now(), worker_group_state.num_workers
        try:
            count = self._counts.while_running(
                nodes, current=current, step=self._newest_step, room=lambda: self._room(nodes)
            )
            if count is None or self._newest_step() >= self._num_steps:
                return NoopDecision()
        except RunFolderError:  # the workers wait longer than this for their store
            return NoopDecision()
        return self._resize(count, nodes)

    def _resize(self, count: int, nodes: Nodes) -> ScalingDecision:
        """Start so many workers; their number must reach Ray Data before their CPUs do."""
        text = f"starts {counted(count, 'train worker')}"
        if count == self._num_workers:
            self._notes.write(_START, text)
        else:
            self._notes.write(RESIZE, f"{text} instead of {self._num_workers}")
            self._num_workers = count
            self._send_resource_request()  # type: ignore[no-untyped-call]
        needs = self._counts.needs._replace(worker_counts=(count,))
        self._cpus_per_data_worker = layout_for(needs, nodes.all).cpus_per_data_worker
        return ResizeDecision(
            num_workers=count,
            resources_per_worker=self.scaling_config._resources_per_worker_not_none,
        )

    def _room(self, nodes: Nodes) -> list[Node]:
        """Return what of each node this run holds, or nothing does."""
        each = self.scaling_config._resources_per_worker_not_none
        held = [(node_id, each.get("CPU", 0.0), each.get("GPU", 0.0)) for node_id in _held_nodes]
        held += [
            (actor["Address"]["NodeID"], self._cpus_per_data_worker, 0.0)
            for actor in data_worker_actors()
            if actor["State"] == "ALIVE"
        ]
        return with_held(nodes, held)

    def _end_if_too_long(self, note: Note | None) -> None:
        message = self._patience.too_long(note)
        if message is not None:
            raise ClusterError(message)

    def _get_num_workers_for_resource_request(self) -> int:
        # Not the most that the run may have: what Ray Train reserves, Ray Data cannot use.
        return self._num_workers


class RunFailures(DefaultFailurePolicy):
    """Ray Train's policy of failures, for workers that start when there is room.

    A start that finds no room after all, since a node has just been lost or another job was faster,
    is no failure: the next one waits. Where nodes come and go each lost node is a failure, so only
    those without a new checkpoint between them add up. A run folder that could not be reached for
    as long as is tried ends the run: each further start would try as long again.

    Args:
        failure_config: Ray Train's settings.
        newest_step: Returns the step of the newest checkpoint.
        is_elastic: Whether nodes come and go.
    """

    def __init__(
        self, failure_config: FailureConfig, *, newest_step: Callable[[], int], is_elastic: bool
    ) -> None:
        super().__init__(failure_config)
        self._newest_step = newest_step
        self._is_elastic = is_elastic
        self._step = -1

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Decide whether the workers start again."""
        cause = getattr(training_failed_error, "controller_failure", None)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY
        if folder_error(training_failed_error) is not None:
            return FailureDecision.RAISE
        step = self._step
        with suppress(RunFolderError):  # else the next start raises it
            step = self._newest_step() if self._is_elastic else -1
        if step > self._step:
            self._step, self._worker_group_failures, self._controller_failures = step, 0, 0
        return super().make_decision(training_failed_error)


class TellWorkers(WorkerGroupCallback):
    """Tells the dataset how many train workers start, and the policy where they are.

    Args:
        dataset: The dataset factory; Ray passes both to the controller in one message.
    """

    def __init__(self, dataset: RemainingDataset) -> None:
        self._dataset = dataset

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Pass on the number of workers, before the dataset is opened."""
        self._dataset.num_workers = worker_group_context.num_workers

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Pass on the workers' nodes."""
        _held_nodes[:] = [worker.metadata.node_id for worker in worker_group.get_workers()]

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Pass on that Ray Train has given up the room of the workers."""
        _held_nodes.clear()
