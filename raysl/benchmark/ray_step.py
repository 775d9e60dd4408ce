"""Measure the training step in actors of Ray, without Ray Train and Ray Data."""

import socket
from contextlib import ExitStack
from typing import Any

import ray

from raysl.benchmark.step import StepCost, StepRequest, measure, slowest
from raysl.run.ray_cluster import connect, disconnect, plan_layout
from raysl.run.ray_errors import own_errors
from raysl.run.recipe import run_from_values


def measure_on_ray(request: StepRequest) -> StepCost:
    """Measure a step in one actor per train worker, placed like the train workers of a run.

    Raises:
        RayslError: The error of an actor.
        ClusterError: If the cluster does not answer, or the workers do not fit.
    """
    with ExitStack() as stack:
        if connect():
            stack.callback(disconnect)
        config = run_from_values(request.config, where="the benchmark")
        layout = plan_layout(config)
        actor: Any = ray.remote(
            num_cpus=layout.cpus_per_train_worker,
            num_gpus=int(request.use_gpu),
            label_selector=config.cluster.train_on or {},
        )(_Worker)
        workers = [actor.remote() for _ in range(request.num_workers)]
        with own_errors("the benchmark"):
            address = ray.get(workers[0].free_address.remote())
            requests = [
                request._replace(rank=rank, rendezvous=f"tcp://{address}")
                for rank in range(request.num_workers)
            ]
            costs = ray.get(
                [
                    worker.measure.remote(each)
                    for worker, each in zip(workers, requests, strict=True)
                ]
            )
        for worker in workers:
            ray.kill(worker)
        return slowest(costs)


class _Worker:
    """An actor that trains in the place of a train worker."""

    def free_address(self) -> str:
        """Return an address of this node at which the workers can meet."""
        with socket.socket() as listening:
            listening.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{listening.getsockname()[1]}"

    def measure(self, request: StepRequest) -> StepCost:
        """Measure a step as one of the workers."""
        return measure(request)
