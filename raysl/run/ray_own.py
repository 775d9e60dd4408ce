"""Start a Ray for this process alone, without the parts that only lasting clusters need."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from ray._private import node, parameter

from raysl.run.ray_forks import forked_workers

_ENVIRONMENT = {
    # No watcher for preempted nodes: the only node is this machine.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How often the controller asks its workers whether they are done; Ray's default is 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # No record of each task for a dashboard: the control store keeps the last 100,000, and grew by
    # some 75 MiB an hour.
    "RAY_task_events_report_interval_ms": "0",
}
OPTIONS: Mapping[str, Any] = {
    # Not the cluster, dead or a stranger's, that a file of an earlier Ray may name.
    "address": "local",
    "include_dashboard": False,
}
"""Arguments of ``ray.init``."""


@contextmanager
def own_ray() -> Iterator[None]:
    """Let ``ray.init`` start a Ray for this process and its children only."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A new Ray asks for a token unless RAY_AUTH_MODE says otherwise, because who reaches one of its
    # ports can start processes. This one only this process and its children know. Ray would write
    # its own to a file in the home folder, and later clusters would require that.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with ExitStack() as stack:
        stack.enter_context(_without_helpers())
        stack.enter_context(forked_workers())
        yield


_PARAMETERS: Mapping[str, Any] = {
    # One node does without the autoscaler's monitor, and the log monitor, which copies what workers
    # print to drivers.
    "no_monitor": True,
    "include_log_monitor": False,
    # Any free port. While the agent of another Ray, or of one that has just ended, has the usual
    # port, the start waits for it for up to 3.4 s.
    "dashboard_agent_listen_port": 0,
}


@contextmanager
def _without_helpers() -> Iterator[None]:
    """Keep ``ray.init`` from starting what only clusters of several users or nodes need.

    Ray 2.60 starts the server behind the dashboard, and waits for it, even without a dashboard.
    """
    parameters: Any = parameter
    nodes: Any = node.Node
    real, start_server = parameters.RayParams, nodes.start_api_server
    parameters.RayParams = partial(real, **_PARAMETERS)
    nodes.start_api_server = lambda self, **_: None
    try:
        yield
    finally:
        parameters.RayParams, nodes.start_api_server = real, start_server
