"""Measure the protocols of an evaluation as Ray tasks, one for each seed.

These are plain tasks, without Ray Train: 2,048 features of 1.28 million images take 10 GB, so a
probe fits on one GPU, where an epoch takes seconds; several GPUs would only wait for each other.
The object store holds the features once, and Ray repeats a task whose node is lost.
"""

import os
from collections.abc import Iterator, Sequence

import ray
import torch

from raysl.downstream.evaluation import FinishedUnit
from raysl.errors import ClusterError
from raysl.evaluate.probes import ProbeResult, ProbeSets
from raysl.evaluate.registry import ProtocolRun, measure_unit
from raysl.run.ray_errors import result_of

_MAX_RETRIES = 3
_LOST = (
    f"a protocol was lost {_MAX_RETRIES + 1} times, as when memory runs out; "
    "the same command resumes with the missing measurements"
)
_LOOK_EVERY_S = 0.5


def run_on_ray(
    units: Sequence[ProtocolRun], probe_sets: ProbeSets, *, device: str
) -> Iterator[FinishedUnit]:
    """Measure units on the connected cluster, and yield each when it is finished.

    Args:
        units: Seeds of protocols to measure.
        probe_sets: Features and labels; they are put into the object store.
        device: ``auto``, ``cpu`` or ``cuda``; auto gives each unit a GPU if the cluster has one.

    Raises:
        ClusterError: If ``device`` is cuda without a GPU, or a task is lost after all retries.
        RayslError: If a protocol fails.
    """
    resources = unit_resources(len(units), device=device)
    shared = ray.put(probe_sets)
    threads = max(1, int(resources["num_cpus"]))
    unit_of = {
        _measure.options(**resources).remote(unit, shared, threads): unit  # type: ignore[attr-defined]
        for unit in units
    }
    running = list(unit_of)
    try:
        while running:
            ended, running = ray.wait(running, num_returns=1, timeout=_LOOK_EVERY_S)
            for reference in ended:
                yield FinishedUnit(unit_of[reference], *result_of(reference, lost=_LOST))
    finally:  # after an error, or Ctrl-C
        for reference in running:
            ray.cancel(reference)


def unit_resources(count: int, *, device: str) -> dict[str, float]:
    """Return the resources of each of ``count`` units on the connected cluster.

    Raises:
        ClusterError: If ``device`` is cuda and the cluster has no GPU.
    """
    total = ray.cluster_resources()
    gpus = total.get("GPU", 0.0)
    if device == "cuda" and gpus < 1:
        raise ClusterError(
            "cluster.device=cuda needs a GPU and the cluster has none; set it to cpu"
        )
    if device != "cpu" and gpus >= 1:
        return {"num_gpus": 1, "num_cpus": 1}
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    share = total.get("CPU", 1.0) // max(1, count)
    return {"num_cpus": max(1.0, min(share, max(nodes, default=1.0))), "num_gpus": 0}


@ray.remote(max_retries=_MAX_RETRIES)
def _measure(unit: ProtocolRun, sets: ProbeSets, threads: int) -> tuple[ProbeResult, float]:
    on_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
    if not on_gpu:
        # Ray may count more CPUs than the machine has.
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
    return measure_unit(unit, sets, device="cuda" if on_gpu else "cpu")
