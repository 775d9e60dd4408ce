"""Compute how many trials of a sweep a cluster can run at a time without deadlocks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

from raysl.errors import ClusterError
from raysl.run.nodes import ANYWHERE
from raysl.run.ray_cluster import Layout, all_nodes, places_for, plan_layout
from raysl.run.recipe import RunConfig
from raysl.sweep.config import SweepConfig


class Shares(NamedTuple):
    """Concurrent trials of a sweep and the resources of each."""

    at_a_time: int
    """Number of concurrent trials."""
    cpus: float
    """CPUs of a trial."""
    gpus: float
    """GPUs of a trial."""
    nested: bool
    """Whether a trial starts its own train workers."""
    why: str
    """Explanation of the numbers in one line."""


def plan_shares(
    sweep: SweepConfig, configs: Sequence[RunConfig[Any]], *, most_trials: int
) -> Shares:
    """Return how many trials run at a time on the connected cluster without waiting for workers.

    Args:
        sweep: The sweep.
        configs: The configurations of the trials to run, or one example.
        most_trials: Maximum number of trials to run.

    Raises:
        ClusterError: If a single trial does not fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = sweep.resources
    workers = max(config.cluster.counts[-1] for config in configs)
    if workers > 1:
        return _nested_shares(sweep, configs, most_trials)
    if any(config.cluster.roles != ANYWHERE for config in configs):
        raise ClusterError(
            "cluster.train_on and cluster.data_on: a trial with one train worker runs in a process "
            "of Ray Tune, which places it by CPUs and GPUs only. Set both to null, or give trials "
            "cluster.num_train_workers=2 or more"
        )
    total_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    wants_gpu = any(config.cluster.device != "cpu" for config in configs)
    gpus = wanted.gpus_per_trial if wanted.gpus_per_trial is not None else 1.0
    gpus = gpus if wants_gpu and total_gpus else 0.0
    total_cpus = sum(node.get("CPU", 0.0) for node in nodes)
    at_most = wanted.trials_at_a_time
    cpus = wanted.cpus_per_trial
    if cpus is None:  # divide all CPUs between the trials that can run at a time
        sharers = at_most or (total_gpus / gpus if gpus else total_cpus)
        cpus = max(1.0, math.floor(total_cpus / sharers))
    elif at_most is not None:  # reserve more CPUs, so that no more than at_most trials start
        cpus = max(cpus, math.floor(100 * total_cpus / at_most) / 100)
    fits = sum(_trials_on_node(node, cpus, gpus) for node in nodes)
    if not fits:
        raise ClusterError(
            f"a trial takes {cpus:g} CPU{f' and {gpus:g} GPU' if gpus else ''}, more than any node "
            f"of the cluster has; lower resources.cpus_per_trial or resources.gpus_per_trial"
        )
    at_a_time = min(at_most or fits, fits, most_trials)
    takes = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    has = f"{total_cpus:g} CPUs" + (f" and {total_gpus:g} GPUs" if total_gpus else "")
    why = f"{at_a_time} at a time: a trial takes {takes}, the cluster has {has}"
    return Shares(at_a_time, cpus, gpus, nested=False, why=why)


def _trials_on_node(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Return how many trials fit on one node."""
    counts = [math.floor(node.get("CPU", 0.0) / cpus)]
    if gpus > 1:
        counts.append(math.floor(node.get("GPU", 0.0) / gpus))
    elif gpus:  # a fraction cannot span two GPUs
        counts.append(int(node.get("GPU", 0.0)) * math.floor(1 / gpus))
    return min(counts)


def _nested_shares(
    sweep: SweepConfig, configs: Sequence[RunConfig[Any]], most_trials: int
) -> Shares:
    layouts = [plan_layout(config) for config in configs]  # raises if a trial does not fit at all
    needs = [
        layout.num_train_workers * layout.cpus_per_train_worker
        + layout.num_data_workers * layout.cpus_per_data_worker
        for layout in layouts
    ]
    total, most = ray.cluster_resources(), max(needs)
    fits = math.floor(total.get("CPU", 0.0) / most)
    gpus = max(layout.num_train_workers * layout.use_gpu for layout in layouts)
    if gpus:
        fits = min(fits, math.floor(total.get("GPU", 0.0) / gpus))
    with_roles = [
        pair for pair in zip(configs, layouts, strict=True) if pair[0].cluster.roles != ANYWHERE
    ]
    fits = min([fits, *(_fits_of_roles(*pair) for pair in with_roles)])
    fits = max(1, fits)
    at_a_time = min(sweep.resources.trials_at_a_time or fits, fits, most_trials)
    why = (
        f"{at_a_time} at a time: a trial takes {most:g} CPUs"
        f"{f' and {gpus:g} GPUs' if gpus else ''} of the cluster's {total.get('CPU', 0.0):g} for "
        f"its train and data workers"
    )
    if any(config.cluster.num_data_workers is None for config in configs):
        why += " (set cluster.num_data_workers and more trials may fit)"
    return Shares(at_a_time, 0.0, 0.0, nested=True, why=why)


def _fits_of_roles(config: RunConfig[Any], layout: Layout) -> int:
    """Return how many trials fit on the nodes that train and on those that make views."""
    roles, nodes = config.cluster.roles, all_nodes()
    workers = layout.num_train_workers
    fits = [
        places_for(layout.cpus_per_train_worker, roles.train_nodes(nodes), use_gpu=layout.use_gpu)
        // workers
    ]
    made = layout.num_data_workers * layout.cpus_per_data_worker
    fits.append(math.floor(sum(node.cpus for node in roles.data_nodes(nodes)) / made))
    return min(fits)
