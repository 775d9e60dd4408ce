"""Bound what an execution of Ray Data keeps and computes, however long it lasts.

Ray Data is made for executions that end. Until the end, its coordinator keeps statistics of each
block, a slot in the queue that restores the order, and the entry in the store of its process
(version 2.60). It also reads the numbers of all blocks ahead, because these take no room in the
object store. Here an execution lasts from the first step of a run to the last, which may be
millions of blocks (docs/scale.md has the figures).

While the output of every task waits for room, the coordinator looks for work without a pause, and
so takes a core from those that train (2.60). Here it waits until an output is taken.
"""

import threading
import time
from collections import deque
from typing import Any

from ray import ObjectRef
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback

# Numbers wait here for a free data worker. A coordinator passes on some 70 blocks a second at most.
MOST_NUMBERS_AHEAD = 64
KEPT_STATISTICS = 32
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05
_WAITED_S = 0.09  # a step as long as this has waited for a task: Ray does so for 0.1 s


def bound_execution(context: DataContext) -> None:
    """Let the executions of a dataset keep little, and wait for their consumers without limit.

    Args:
        context: The settings of the dataset; changed in place.
    """
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, FewNumbersAhead]
    )
    context.custom_execution_callback_classes = [ForgetConsumed, PauseWithoutChange]
    # By default an execution fails when no block has moved for half an hour, as in a long
    # validation. What trains has a watchdog of its own (health.max_step_s).
    context.execution_no_progress_timeout_s = -1


class FewNumbersAhead(BackpressurePolicy):
    """Stops the read tasks while enough numbers wait for data workers."""

    def can_add_input(self, op: Any) -> bool:
        """Return whether another task of an operator may start."""
        return not self._has_enough(op)

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """Return 0 if the outputs of an operator's tasks must wait, else None."""
        return 0 if self._has_enough(op) else None

    def _has_enough(self, op: Any) -> bool:
        reads = bool(op.input_dependencies) and not op.input_dependencies[0].input_dependencies
        return reads and self._topology[op].total_enqueued_output_blocks() >= MOST_NUMBERS_AHEAD


class ForgetConsumed(ExecutionCallback):
    """Drops what the coordinator keeps of blocks that are no longer used."""

    def __init__(self) -> None:
        self._gone: deque[bytes] = deque()

    def before_execution_starts(self, executor: Any) -> None:
        """Note the blocks whose last reference goes."""
        counter = executor._block_ref_counter
        count, when_gone = counter.on_block_produced, counter._add_callback_fn

        def on_block_produced(block: Any, size_bytes: int, producer: str) -> None:
            count(block, size_bytes, producer)
            when_gone(block, self._gone.append)

        counter.on_block_produced = on_block_produced

    def on_execution_step(self, executor: Any) -> None:
        """Forget old statistics, slots whose outputs were taken, and entries of unused blocks."""
        for op in executor._topology:
            statistics = getattr(op, "_output_blocks_stats", None)
            if statistics is not None:
                del statistics[:-KEPT_STATISTICS]
            queue = getattr(op, "_output_queue", None)
            if hasattr(queue, "_finalized_keys"):
                _forget_slots(queue)
        for _ in range(len(self._gone)):
            # If a train worker dropped the last reference, Ray has forgotten the reference but not
            # the entry. It forgets that, too, when a reference of this process is dropped.
            ObjectRef(self._gone.popleft())  # type: ignore[no-untyped-call]


def _forget_slots(queue: Any) -> None:
    for task in [task for task in queue._inner if task < queue._current_key]:
        del queue._inner[task]
        queue._finalized_keys.discard(task)


class PauseWithoutChange(ExecutionCallback):
    """Lets the coordinator wait while it has nothing to do, until an output is taken.

    The pause doubles from step to step, as Ray's thread that fetches the sizes of blocks may
    bring new work as well: it then comes late by no more than it took.
    """

    def __init__(self) -> None:
        self._taken = threading.Event()
        self._pause_s = SHORTEST_PAUSE_S
        self._progress: list[int] = []
        self._step_ended = 0.0

    def before_execution_starts(self, executor: Any) -> None:
        """Note each output that a consumer takes."""
        _, outputs = executor._output_node
        take = outputs.get_output_blocking

        def get_output_blocking(split: int | None) -> Any:
            output = take(split)
            self._taken.set()
            return output

        outputs.get_output_blocking = get_output_blocking

    def on_execution_step(self, executor: Any) -> None:
        """Wait after a step that neither changed anything nor waited."""
        progress = [number for each in executor._topology.items() for number in _progress(*each)]
        waited = time.monotonic() - self._step_ended > _WAITED_S
        if waited or progress != self._progress or self._taken.wait(self._pause_s):
            self._pause_s = SHORTEST_PAUSE_S
        else:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._taken.clear()
        self._progress, self._step_ended = progress, time.monotonic()


def _progress(op: Any, state: Any) -> tuple[int, ...]:
    """Return what grows or shrinks when an operator starts, ends or passes on anything."""
    metrics = op.metrics
    return (
        metrics.num_tasks_submitted,
        metrics.num_tasks_finished,
        metrics.num_task_outputs_generated,
        state.total_enqueued_output_blocks(),
    )
