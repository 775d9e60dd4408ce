"""Connect to Ray, and check that a run fits the cluster."""

import logging
import math
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from raysl.errors import ClusterError

if TYPE_CHECKING:  # the recipe loads torch; Ray's actors import this file and must not
    from raysl.run.recipe import RunConfig

# The read stage yields numbers only; it needs a sliver of a CPU, but it needs it.
READ_CPUS = 0.01
_MARGIN = 0.02

# What every process of a run needs to know. Ray reads most of these only at its start.
WORKER_ENVIRONMENT = {
    # Threads of torch that wait must sleep: spinning ones take the cores from the data workers
    # (65 against 245 images a second on two busy cores).
    "OMP_WAIT_POLICY": "passive",
    # But not at once: bfloat16 on CPU waits so often that it runs 50 times slower (ADR 5).
    "GOMP_SPINCOUNT": "30000",
    # Off, or a driver under `uv run` starts every worker through uv, with a copy of the folder.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Workers stay in the driver's folder, or relative paths (evaluate.source) would not be found.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Layout(NamedTuple):
    """How a run is laid out over the cluster."""

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
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return False
    if "RAY_ADDRESS" not in os.environ:
        # A cluster of our own on this machine: without this, Ray would write a token into the
        # home folder and later clusters would ask for it.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env=worker_runtime_env())
    except Exception as error:  # also a bare one, if a busy machine takes over 30 s to start it
        raise ClusterError(
            f"cannot connect to Ray ({os.environ.get('RAY_ADDRESS', 'this machine')}): {error}"
        ) from None
    return True


def disconnect() -> None:
    """Leave the cluster; one that :func:`connect` started on this machine ends."""
    with suppress(RuntimeError):
        ray.shutdown()


def worker_runtime_env() -> dict[str, dict[str, str]] | None:
    """Return what workers of a cluster that runs already have to be told.

    Those of a cluster of our own inherit this process's environment, and None lets them come from
    the processes that Ray starts beforehand: seconds less to the first step.
    """
    if "RAY_ADDRESS" not in os.environ:
        return None
    wanted = {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    return {"env_vars": wanted}


def plan_layout(config: "RunConfig[Any]") -> Layout:
    """Lay a run out over the connected cluster.

    Raises:
        ClusterError: If it does not fit. Ray Data would wait for ever, without a word, for CPUs
            that the train workers hold.
    """
    cluster, total = config.cluster, ray.cluster_resources()
    workers, cpus = cluster.num_train_workers, total.get("CPU", 0.0)
    gpus = total.get("GPU", 0.0)
    use_gpu = cluster.device == "cuda" or (cluster.device == "auto" and gpus >= workers)
    if use_gpu and gpus < workers:
        raise ClusterError(
            f"cluster.device=cuda needs {workers} GPUs, one a train worker; the cluster has "
            f"{gpus:g}. Lower cluster.num_train_workers or set cluster.device=cpu"
        )
    # On a machine of one or two CPUs half of them: share it rather than refuse it.
    half = math.floor(50 * cpus / workers) / 100
    per_worker = cluster.cpus_per_train_worker or (1.0 if workers < cpus else half)
    left = cpus - workers * per_worker - READ_CPUS - _MARGIN
    data_workers = cluster.num_data_workers or max(1, math.floor(left + READ_CPUS + _MARGIN))
    each = math.floor(100 * min(1.0, left / data_workers)) / 100
    if per_worker <= 0 or each < _MARGIN:
        raise ClusterError(
            f"{workers} train workers with cluster.cpus_per_train_worker={per_worker:g} leave no "
            f"CPU of the cluster's {cpus:g} to make views. Lower cluster.num_train_workers or "
            f"cluster.cpus_per_train_worker, or add nodes"
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cores = min(int(node["Resources"].get("CPU", 0)) for node in nodes) or 1
    on_one_node = math.ceil(workers / len(nodes))
    threads = cluster.threads_per_train_worker or max(1, cores // on_one_node)
    return Layout(
        workers,
        per_worker,
        data_workers,
        each,
        use_gpu,
        threads,
        len(nodes),
        spare_cpus=max(0, math.floor(left - data_workers * each)),
        spare_gpus=max(0, math.floor(gpus) - workers) if use_gpu else 0,
    )


def describe_cluster() -> dict[str, str]:
    """Return Ray's version and the cluster's size, for the record of the run."""
    total = ray.cluster_resources()
    return {
        "ray": ray.__version__,
        "cluster.nodes": str(sum(node["Alive"] for node in ray.nodes())),
        "cluster.cpus": f"{total.get('CPU', 0):g}",
        "cluster.gpus": f"{total.get('GPU', 0):g}",
    }
