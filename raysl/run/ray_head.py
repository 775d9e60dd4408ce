"""Notice that the head of the cluster is gone, before Ray ends this process because of it."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray import _raylet

from raysl.errors import ClusterError

# Ray 2.60 gives up after 60 s, and ends the process.
_PATIENCE_S = 40.0
_TIMEOUT_S = 2.0
_REMEDY = "Start the cluster if it is gone; the same command resumes from the last checkpoint"


class HeadWatch:
    """Watches the control store of the connected cluster.

    If the control store does not answer, Ray's clients end this process after a minute. If that of
    another cluster answers at its address, they end it at once. Either way the user sees a stack
    trace and not a word about the run, so code that asks Ray something calls :meth:`answers` first.

    Args:
        address: Host and port of the control store.
        cluster: Ray's identifier of the cluster.
        tell: Receives a line when the control store does not answer, and when it does again.
        patience_s: Seconds to wait for it; one that keeps its state on a disk may come back.
    """

    def __init__(
        self,
        address: str,
        cluster: str,
        *,
        tell: Callable[[str], None],
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._address, self._cluster = address, cluster
        self._tell = tell
        self._patience_s = patience_s
        self._silent_since: float | None = None

    def answers(self) -> bool:
        """Return whether the control store answers now.

        Raises:
            ClusterError: If it has not answered for too long, or is that of another cluster.
        """
        since, now = self._silent_since, time.monotonic()
        if not self._accepts():
            if since is None:
                self._silent_since = now
                self._tell(f"the head of the cluster ({self._address}) does not answer; waiting")
            elif now - since > self._patience_s:
                raise ClusterError(
                    f"the head of the cluster ({self._address}) has not answered for "
                    f"{now - since:.0f} s. {_REMEDY}"
                )
            return False
        if since is not None:
            if cluster_at(self._address) != self._cluster:
                raise ClusterError(
                    f"the head of the cluster ({self._address}) was started anew, and does not "
                    f"know this run. {_REMEDY}"
                )
            self._silent_since = None
            self._tell("the head of the cluster answers again")
        return True

    def _accepts(self) -> bool:
        host, _, port = self._address.rpartition(":")
        place = host.strip("[]"), int(port)
        with suppress(OSError), socket.create_connection(place, timeout=_TIMEOUT_S):
            return True
        return False


def watch_head(tell: Callable[[str], None]) -> HeadWatch:
    """Return a watch of the connected cluster."""
    node: Any = ray._private.worker.global_worker.node
    address = ray.get_runtime_context().gcs_address
    return HeadWatch(address, node.cluster_id.hex(), tell=tell)


def cluster_at(address: str) -> str:
    """Return Ray's identifier of the cluster whose control store answers at an address."""
    clients: Any = _raylet
    identifier: str = clients.GcsClient(address=address).cluster_id.hex()
    return identifier
