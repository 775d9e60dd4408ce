"""Decide how many train workers a run has, from the nodes that are there. No Ray, no clock."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from raysl.errors import ClusterError, counted
from raysl.run.nodes import Node, Nodes, describe_nodes
from raysl.run.ray_cluster import ClusterNeeds, layout_for, places_for

_SETTLE_S = 15.0
_STUCK_S = 30.0


class Pace(NamedTuple):
    """How soon the number of train workers follows the nodes, in seconds.

    Attributes:
        resize_every_s: Shortest time between two increases, from the start of the workers on.
        settle_s: Time for which a start waits for more room that the cluster has but that
            something holds, such as the workers that have just ended.
        stuck_s: Time after which running workers give up CPUs that data workers lack.
    """

    resize_every_s: float
    settle_s: float = _SETTLE_S
    stuck_s: float = _STUCK_S


class WorkerCounts:
    """Decides how many train workers a run has at each start, and when it has other ones.

    Args:
        needs: What the run asks of the cluster, with device and CPUs of a train worker decided.
        pace: How soon the number follows the nodes.
        clock: Returns seconds that never decrease.
    """

    def __init__(self, needs: ClusterNeeds, pace: Pace, clock: Callable[[], float]) -> None:
        self.needs = needs
        self.pace = pace
        self._clock = clock
        self._asked_since: float | None = None
        self._looked_at = clock()
        self._stuck_since: float | None = None
        self._step_at_look: int | None = None

    def at_start(self, nodes: Nodes) -> int | None:
        """Return how many workers to start now; None waits."""
        now = self._clock()
        self._asked_since = now if self._asked_since is None else self._asked_since
        possible, best = self._most(nodes.free), self._most(nodes.all)
        waited = now - self._asked_since
        if possible is None or (possible < (best or 0) and waited < self.pace.settle_s):
            return None
        self._asked_since = self._stuck_since = self._step_at_look = None
        self._looked_at = now
        return possible

    def while_running(
        self,
        nodes: Nodes,
        *,
        current: int,
        step: Callable[[], int],
        room: Callable[[], Sequence[Node]],
    ) -> int | None:
        """Return with how many workers to go on; None goes on with those that run.

        More workers start only after a checkpoint, so that no step is computed twice. Fewer start
        at once if the CPUs that the data workers need are gone: such a run makes no step.

        Args:
            nodes: The nodes of the cluster.
            current: Number of train workers that run.
            step: Returns the step of the newest checkpoint; asked rarely, as it may be far away.
            room: Returns what of each node this run holds or nothing does; asked rarely.
        """
        if len(self.needs.worker_counts) == 1:
            return None
        now = self._clock()
        if self._most(nodes.all, (current,)) is None:
            self._stuck_since = now if self._stuck_since is None else self._stuck_since
            fewer = tuple(n for n in self.needs.worker_counts if n < current)
            is_stuck = now - self._stuck_since >= self.pace.stuck_s
            return self._most(nodes.all, fewer) if is_stuck else None
        self._stuck_since = None
        if self._step_at_look is None:
            if now - self._looked_at >= self.pace.resize_every_s:
                self._looked_at = now
                if (self._most(room()) or 0) > current:
                    self._step_at_look = step()
            return None
        if step() == self._step_at_look:
            return None
        self._step_at_look, self._looked_at = None, now
        more = self._most(room()) or 0
        return more if more > current else None

    def missing(self, nodes: Nodes) -> str:
        """Return what a start waits for, in one line."""
        fewest, needs, roles = self.needs.worker_counts[0], self.needs, self.needs.roles
        if (node := roles.missing(nodes.all)) is not None:
            return f"waits for {node}"
        cpus, use_gpu = needs.cpus_per_train_worker or 0.0, needs.device == "cuda"
        train = nodes.only(roles.trains)
        placed = min(fewest, places_for(cpus, train.free, use_gpu=use_gpu))
        each = f"{cpus:g} CPUs{' and 1 GPU' if use_gpu else ''}"
        if placed < fewest:
            what = f"{fewest - placed} of {counted(fewest, 'train worker')}, {each} each"
            where, asked = train, roles.of_train
        else:
            what = f"CPUs to make views, besides {counted(fewest, 'train worker')} of {each}"
            where, asked = nodes.only(roles.makes_views), roles.of_data
        on = f", on the nodes{asked}" if asked else ""
        return f"waits for room for {what}{on}: {describe_nodes(*where)}"

    def _most(self, nodes: Sequence[Node], counts: tuple[int, ...] | None = None) -> int | None:
        """Return the most workers that fit, of the allowed counts; None if none does."""
        counts = self.needs.worker_counts if counts is None else counts
        if counts and nodes:
            with suppress(ClusterError):
                return layout_for(
                    self.needs._replace(worker_counts=counts), nodes
                ).num_train_workers
        return None


def with_held(nodes: Nodes, held: Sequence[tuple[str, float, float]]) -> list[Node]:
    """Return the free part of each node together with what some actors hold of it.

    Args:
        nodes: The nodes of the cluster.
        held: Of each actor, the id of its node, its CPUs and its GPUs.
    """
    room = []
    for node, free in zip(nodes.all, nodes.free, strict=True):
        own = [(cpus, gpus) for node_id, cpus, gpus in held if node_id == node.node_id]
        cpus = free.cpus + sum(cpus for cpus, _ in own)
        gpus = free.gpus + sum(gpus for _, gpus in own)
        room.append(free._replace(cpus=min(node.cpus, cpus), gpus=min(node.gpus, gpus)))
    return room
