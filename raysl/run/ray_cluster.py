"""Connect to Ray, divide the cluster between the workers of a run, and wait in a thread."""

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import ray

from raysl.errors import ClusterError
from raysl.run.forks import end_server
from raysl.run.nodes import ANYWHERE, Node, Nodes, Roles, describe_nodes
from raysl.run.ray_own import OPTIONS, own_ray
from raysl.run.stop import keeps_sigterm
from raysl.run.variables import WORKER_VARIABLES, has_own_ray, set_worker_variables

if TYPE_CHECKING:  # the recipe loads torch; Ray's actors import this file and must not
    from raysl.run.recipe import RunConfig

T = TypeVar("T")

# The read stage yields only numbers, but Ray starts it only if this share of a CPU is free.
READ_CPUS = 0.01
_MARGIN = 0.02
_ROUNDING = 1e-6  # Ray counts in units of 1e-4


class ClusterNeeds(NamedTuple):
    """What a run asks of the cluster.

    Attributes:
        worker_counts: Numbers of train workers that the run may have, ascending; one if fixed.
        device: ``cluster.device``, or what the first layout decided.
        cpus_per_train_worker: ``cluster.cpus_per_train_worker``, or what the first layout decided.
        num_data_workers: ``cluster.num_data_workers``.
        threads_per_train_worker: ``cluster.threads_per_train_worker``.
        roles: ``cluster.train_on`` and ``cluster.data_on``.
    """

    worker_counts: tuple[int, ...]
    device: str
    cpus_per_train_worker: float | None
    num_data_workers: int | None
    threads_per_train_worker: int | None
    roles: Roles = ANYWHERE


class Layout(NamedTuple):
    """Workers of a run and their shares of the cluster."""

    num_train_workers: int
    cpus_per_train_worker: float
    num_data_workers: int
    cpus_per_data_worker: float
    use_gpu: bool
    threads_per_train_worker: int
    num_nodes: int
    spare_cpus: int = 0
    spare_gpus: int = 0


def connect() -> bool:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine.

    Returns:
        Whether this call connected; False if the process was connected already.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    set_worker_variables()
    if ray.is_initialized():
        return False
    is_ours = has_own_ray()
    try:
        with keeps_sigterm(), own_ray() if is_ours else nullcontext():
            ray.init(
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env=worker_runtime_env(),
                **(OPTIONS if is_ours else {}),
            )
    except Exception as error:  # Ray raises a plain Exception if its start takes over 30 s
        end_server()
        raise ClusterError(
            f"cannot connect to Ray ({os.environ.get('RAY_ADDRESS', 'this machine')}): {error}"
        ) from None
    return True


def disconnect() -> None:
    """Disconnect from the cluster, and stop it if :func:`connect` started it."""
    with suppress(RuntimeError):
        ray.shutdown()
    end_server()


def started_here() -> bool:
    """Return whether this process started the cluster, which then ends with it."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def start_shared_actors() -> None:
    """Start the actors that Ray Data shares in a cluster, without waiting for them.

    Ray starts each when it first needs it, and then waits for its process for a second or two.
    """
    from ray.data._internal import stats  # noqa: PLC0415 - one second, for runs on Ray only
    from ray.data._internal.cluster_autoscaler import (  # noqa: PLC0415
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.execution.node_trackers import (  # noqa: PLC0415
        get_or_create_actor_location_tracker,
    )

    get_or_create_autoscaling_coordinator()
    stats.get_or_create_stats_actor()
    get_or_create_actor_location_tracker()


def worker_runtime_env() -> dict[str, dict[str, str]] | None:
    """Return the runtime environment of workers in an existing cluster, else None.

    Workers of a cluster that this process started inherit its environment. None lets Ray use its
    prestarted processes for the actors that Ray Data shares.
    """
    if has_own_ray():
        return None
    variables = {name: os.environ.get(name, value) for name, value in WORKER_VARIABLES.items()}
    return {"env_vars": variables}


def needs_of(config: "RunConfig[Any]", layout: Layout | None = None) -> ClusterNeeds:
    """Return what a run asks of the cluster.

    Args:
        config: The run's configuration.
        layout: The layout that its train workers started with; it fixes their device and CPUs.
    """
    cluster = config.cluster
    needs = ClusterNeeds(
        config.worker_counts,
        cluster.device,
        cluster.cpus_per_train_worker,
        cluster.num_data_workers,
        cluster.threads_per_train_worker,
        cluster.roles,
    )
    if layout is None:
        return needs
    device = "cuda" if layout.use_gpu else "cpu"
    return needs._replace(device=device, cpus_per_train_worker=layout.cpus_per_train_worker)


def plan_layout(config: "RunConfig[Any]") -> Layout:
    """Divide the connected cluster between the workers of a run; see :func:`layout_for`."""
    return layout_for(needs_of(config))


def all_nodes() -> list[Node]:
    """Return the nodes of the connected cluster."""
    return [_node(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]


def nodes_now() -> Nodes:
    """Return the nodes of the connected cluster, and what nothing holds of each."""
    held: Any = ray._private.state.available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Nodes(
        [_node(node, node["Resources"]) for node in alive],
        [_node(node, held.get(node["NodeID"], {})) for node in alive],
    )


def _node(node: Any, resources: Any) -> Node:
    cpus, gpus = (float(resources.get(kind, 0.0)) for kind in ("CPU", "GPU"))
    labels = node.get("Labels") or {}
    return Node(node.get("NodeManagerAddress", ""), cpus, gpus, node.get("NodeID", ""), labels)


def layout_for(needs: ClusterNeeds, nodes: Sequence[Node] | None = None) -> Layout:
    """Divide nodes between train workers, as many as fit of the allowed counts, and data workers.

    Args:
        needs: What the run asks of the cluster.
        nodes: The nodes to divide; None takes those that are there now.

    Raises:
        ClusterError: If the run does not fit. Ray Data would wait forever, without a message, for
            CPUs that the train workers hold.
    """
    nodes = all_nodes() if nodes is None else nodes
    missing = needs.roles.missing(nodes)
    if missing is not None:
        raise ClusterError(f"the cluster has no place for this run, which needs {missing}")
    fewest, gpus = needs.worker_counts[0], sum(n.gpus for n in needs.roles.train_nodes(nodes))
    use_gpu = needs.device == "cuda" or (needs.device == "auto" and gpus >= fewest)
    for workers in reversed(needs.worker_counts[1:]):
        with suppress(ClusterError):
            return _layout_of(workers, needs, nodes, use_gpu=use_gpu)
    return _layout_of(fewest, needs, nodes, use_gpu=use_gpu)


def _layout_of(
    workers: int, needs: ClusterNeeds, nodes: Sequence[Node], *, use_gpu: bool
) -> Layout:
    """Divide nodes between so many train workers and their data workers."""
    roles = needs.roles
    train, data = roles.train_nodes(nodes), roles.data_nodes(nodes)
    cpus, gpus = sum(node.cpus for node in train), sum(node.gpus for node in train)
    if use_gpu and gpus < workers:
        has = "the cluster has" if roles.train_on is None else f"the nodes{roles.of_train} have"
        raise ClusterError(
            f"cluster.device=cuda needs {workers} GPUs, one per train worker; {has} {gpus:g}. "
            f"Lower cluster.num_train_workers or set cluster.device=cpu"
        )
    per_worker = needs.cpus_per_train_worker or _default_cpus(workers, needs, cpus, data)
    both = [node for node in train if roles.makes_views(node)]
    taken = workers * per_worker  # of the CPUs that make views, at most
    if per_worker > 0 and len(both) < len(train):
        taken = min(workers, places_for(per_worker, both, use_gpu=use_gpu)) * per_worker
    left = sum(node.cpus for node in data) - taken - READ_CPUS - _MARGIN
    data_workers = needs.num_data_workers or max(1, math.floor(left + READ_CPUS + _MARGIN))
    each = left / data_workers
    if per_worker > 0 and (placed := places_for(per_worker, train, use_gpu=use_gpu)) >= workers:
        each = min(each, _largest_rest(workers, per_worker, data, roles, use_gpu=use_gpu))
    cpus_each = math.floor(100 * min(1.0, each)) / 100
    if per_worker <= 0 or cpus_each < _MARGIN:
        whose = "the" if roles.data_on else "the cluster's"
        raise ClusterError(
            f"{workers} train workers with cluster.cpus_per_train_worker={per_worker:g} leave none "
            f"of {whose} {sum(node.cpus for node in data):g} CPUs{roles.of_data} to make views. "
            f"Lower cluster.num_train_workers or cluster.cpus_per_train_worker, or add nodes"
        )
    if placed < workers:
        raise ClusterError(
            f"the nodes{roles.of_train} have room for {placed} of {workers} train workers of "
            f"{per_worker:g} CPUs{' and 1 GPU' if use_gpu else ''} each: {describe_nodes(train)}. "
            f"Lower cluster.num_train_workers or cluster.cpus_per_train_worker, or add nodes"
        )
    training = roles.train_nodes(nodes, use_gpu=use_gpu)
    # The train workers of a later start may need a GPU that is spare now.
    spare_gpus = math.floor(gpus) - workers if use_gpu and len(needs.worker_counts) == 1 else 0
    # The actor that evaluates runs beside a train worker.
    spare = left - data_workers * cpus_each if both else (cpus - workers * per_worker) / len(train)
    return Layout(
        workers,
        per_worker,
        data_workers,
        cpus_each,
        use_gpu,
        needs.threads_per_train_worker or threads_for(workers, training),
        len(roles.members(nodes)),
        spare_cpus=max(0, math.floor(spare)),
        spare_gpus=max(0, spare_gpus),
    )


def _default_cpus(workers: int, needs: ClusterNeeds, cpus: float, data: Sequence[Node]) -> float:
    """Return the CPUs of a train worker if the configuration does not say it.

    Args:
        workers: Number of train workers.
        needs: What the run asks of the cluster.
        cpus: All CPUs of the nodes that train.
        data: The nodes that make views.
    """
    # On a machine of one or two CPUs, train workers take half of them instead of failing, but a
    # range does not have more of them for that. Where other nodes make views, they take all.
    shares = all(needs.roles.trains(node) for node in data)
    whole = workers < cpus or (workers == cpus and not shares)
    if whole or workers > needs.worker_counts[0]:
        return 1.0
    return math.floor((50 if shares else 100) * cpus / workers) / 100


def threads_for(workers: int, nodes: Sequence[Node]) -> int:
    """Return the threads of each train worker: the cores of the smallest node, divided evenly."""
    cores = min(int(node.cpus) for node in nodes) or 1
    return max(1, cores // math.ceil(workers / len(nodes)))


def places_for(cpus: float, nodes: Sequence[Node], *, use_gpu: bool) -> int:
    """Return how many train workers of so many CPUs the nodes have room for, each on one node."""
    return sum(_places_on(node, cpus, use_gpu=use_gpu) for node in nodes)


def _places_on(node: Node, cpus: float, *, use_gpu: bool) -> int:
    places = math.floor(node.cpus / cpus + _ROUNDING)
    return min(places, math.floor(node.gpus)) if use_gpu else places


def _largest_rest(
    workers: int, cpus: float, nodes: Sequence[Node], roles: Roles, *, use_gpu: bool
) -> float:
    """Return the CPUs that some node has left, wherever Ray places so many train workers."""
    places = [_places_on(node, cpus, use_gpu=use_gpu) * roles.trains(node) for node in nodes]
    rests = [node.cpus - taken * cpus for node, taken in zip(nodes, places, strict=True)]
    return max(*rests, cpus) if workers < sum(places) else max(rests)


def describe_cluster() -> dict[str, str]:
    """Return Ray's version and the cluster's size as tags of the run."""
    total = ray.cluster_resources()
    return {
        "ray": ray.__version__,
        "cluster.nodes": str(sum(node["Alive"] for node in ray.nodes())),
        "cluster.cpus": f"{total.get('CPU', 0):g}",
        "cluster.gpus": f"{total.get('GPU', 0):g}",
    }


def in_background(work: Callable[[], T], *, name: str) -> "Future[T]":
    """Start ``work`` in a daemon thread and return the future of its result."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # re-raised by future.result()
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
