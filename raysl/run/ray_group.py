"""Start a train worker and its process group, without torch in Ray Train's controller.

The controller loads this module, and the train workers wait for the controller. So the module must
not import torch, which takes seconds. A train worker opens its stream, whose actors take seconds as
well, before it imports torch.
"""

import os
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
import ray.train
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

from raysl.run.ray_data import iterate_shard


class BatchOptions(NamedTuple):
    """How a train worker takes batches from its shard of the stream.

    Attributes:
        batch_size: Images per batch.
        prefetch_batches: Number of batches to prefetch.
        blocks_per_batch: Blocks per batch; 1 if a block holds one or several batches.
    """

    batch_size: int
    prefetch_batches: int
    blocks_per_batch: int


def train_worker(settings: dict[str, Any]) -> Any:
    """Open this worker's stream, then run :func:`raysl.run.ray_worker.train_worker` with it.

    Args:
        settings: ``batches``, a :class:`BatchOptions`; and ``settings``, the object reference of
            the other settings.
    """
    batches = iterate_shard(
        lambda: ray.train.get_dataset_shard("train"), **settings["batches"]._asdict()
    )
    from raysl.run import ray_worker  # noqa: PLC0415 - loads torch, while the stream starts

    return ray_worker.train_worker(ray.get(settings["settings"]), batches)


@dataclass
class ProcessGroupConfig(BackendConfig):
    """A process group that the workers join when they have loaded torch.

    Ray's own ``TorchConfig`` loads torch in the controller, and then lets the workers load it
    before they run anything else.

    Args:
        backend: ``gloo`` or ``nccl``.
        shutdown_timeout_s: Seconds that workers have for leaving the group.
    """

    backend: str
    shutdown_timeout_s: float = 30.0

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that starts and ends the process group."""
        return ProcessGroup


class ProcessGroup(Backend):
    """Prepares the train workers for a process group, and lets them leave it."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Tell all workers where rank 0 is."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_set_master, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Let all workers leave; one that does not answer ends with its process."""
        leaving = worker_group.execute_async(_leave, len(worker_group) > 1)
        ray.wait(leaving, num_returns=len(leaving), timeout=backend_config.shutdown_timeout_s)


def _set_master(address: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _leave(destroy: bool) -> None:
    if "torch" in sys.modules:  # else the worker ended before it joined
        from ray.train.torch.config import _shutdown_torch  # noqa: PLC0415 - loads torch

        _shutdown_torch(destroy_process_group=destroy)
