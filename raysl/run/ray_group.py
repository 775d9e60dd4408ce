"""Start a train worker and its process group, without torch in Ray Train's controller.

The controller loads this module, and the train workers wait for the controller. So the module must
not import torch, which takes seconds. A train worker opens its stream, whose actors take seconds as
well, before it imports torch.
"""

import os
import sys
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
import ray.train
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

from raysl.data.plan import item_size_for
from raysl.run.ray_data import iterate_shard
from raysl.run.ray_notes import Notes, first_batch_with_notes


class BatchOptions(NamedTuple):
    """How the train workers take batches from their shards of the stream.

    Attributes:
        global_batch_size: Images of one step over all workers.
        bytes_per_image: Bytes of all views of one image.
        prefetch_batches: Number of batches that a worker prefetches.
    """

    global_batch_size: int
    bytes_per_image: int
    prefetch_batches: int

    def of_worker(self, num_workers: int) -> dict[str, int]:
        """Return the sizes for :func:`iterate_shard` in one of so many workers."""
        batch_size = self.global_batch_size // num_workers
        item_size = item_size_for(batch_size, bytes_per_image=self.bytes_per_image)
        return {
            "batch_size": batch_size,
            "prefetch_batches": self.prefetch_batches,
            "blocks_per_batch": batch_size // item_size,
        }


def train_worker(settings: dict[str, Any]) -> Any:
    """Open this worker's stream, then run :func:`raysl.run.ray_worker.train_worker` with it.

    Args:
        settings: ``batches``, a :class:`BatchOptions`; ``notes``, the run's name for
            :class:`raysl.run.ray_notes.Notes`; ``roles`` of the nodes; and ``settings``, the object
            reference of the other settings.
    """
    context, notes = ray.train.get_context(), Notes(settings["notes"])
    tells = context.get_world_rank() == 0
    if tells:
        notes.write("load", "waits for its train workers to load and to find each other")
    batches = iterate_shard(
        lambda: ray.train.get_dataset_shard("train"),
        wait=first_batch_with_notes(notes, settings["roles"]) if tells else Future.result,
        **settings["batches"].of_worker(context.get_world_size()),
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
