"""Split the executions of Ray Data over the train workers, one execution for each group of ranks.

The coordinator of an execution is one thread on the node of whoever starts it. Here each runs on
the node of its group's first train worker, which takes its blocks from there.
"""

import secrets
from contextlib import suppress
from typing import Any

import ray
from ray.data import DataIterator, Dataset
from ray.data._internal.iterator.stream_split_iterator import (
    SplitCoordinator,
    StreamSplitDataIterator,
)
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import StreamingSplit
from ray.train import DataConfig
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysl.run.nodes import ANYWHERE, Roles
from raysl.run.ray_data import Stream, execution_options


class StreamConfig(DataConfig):
    """Ray Train's settings of the stream, for one or several executions.

    Ray Train ends only the execution of rank 0 when its workers end; :class:`EndExecutions` ends
    the others. A single execution is Ray Train's affair alone.

    Args:
        run: A text that names the run in the cluster.
        roles: Which nodes make views.
    """

    def __init__(self, run: str, roles: Roles = ANYWHERE) -> None:
        super().__init__(execution_options=execution_options(roles))
        self.run = run

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        """Return the shard of each rank.

        Args:
            datasets: By name, the result of :class:`raysl.run.ray_data.RemainingDataset`.
            world_size: Number of train workers.
            worker_handles: Not used.
            worker_node_ids: The node of each train worker.
            kwargs: For later versions of Ray.
        """
        ((name, streams),) = datasets.items()
        if len(streams) == 1:
            alone = {name: streams[0].dataset}
            return super().configure(alone, world_size, worker_handles, worker_node_ids, **kwargs)
        start = secrets.token_hex(4)  # actors of the last start may still be there
        return [
            {name: shard}
            for number, stream in enumerate(streams)
            for shard in self._split(
                stream,
                f"{name}_{number}",
                actor=f"{_prefix(self.run)}{start}-{number}",
                nodes=None if worker_node_ids is None else worker_node_ids[_slice(stream.ranks)],
            )
        ]

    def _split(
        self, stream: Stream, name: str, *, actor: str, nodes: list[str] | None
    ) -> list[DataIterator]:
        """Do what `Dataset.streaming_split` does, with a coordinator that has a node and a name."""
        num_ranks = len(stream.ranks)
        dataset = stream.dataset
        dataset.set_name(name)
        dataset.context.execution_options = self._resolve_execution_options(name)
        split = StreamingSplit(
            num_splits=num_ranks,
            equal=True,
            input_dependencies=[dataset._logical_plan.dag],
            locality_hints=nodes,
        )
        whole = Dataset._from_parent(dataset, LogicalPlan(split, dataset.context))
        whole._set_uuid(dataset._uuid)
        node = nodes[0] if nodes else ray.get_runtime_context().get_node_id()
        coordinator_class: Any = SplitCoordinator  # Ray adds `options`
        coordinator = coordinator_class.options(
            name=actor,
            max_concurrency=num_ranks + 1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        ).remote(whole, num_ranks, nodes)
        return [
            StreamSplitDataIterator(coordinator, place, num_ranks) for place in range(num_ranks)
        ]


class EndExecutions(WorkerGroupCallback):
    """Ends the executions of all groups when the train workers end, so that their CPUs are free.

    Args:
        run: A text that names the run in the cluster.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """End the executions after the train workers have ended or failed."""
        self._end()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        """End the executions after the train workers were killed."""
        self._end()

    def _end(self) -> None:
        for name in ray.util.list_named_actors():
            if name.startswith(_prefix(self.run)):
                with suppress(ValueError, ray.exceptions.RayError):  # it has ended meanwhile
                    ray.get_actor(name).shutdown_executor.remote()


def _prefix(run: str) -> str:
    return f"raysl-stream {run} "


def _slice(ranks: range) -> slice:
    return slice(ranks.start, ranks.stop)
