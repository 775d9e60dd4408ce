"""Start a Ray for this process alone, without the parts that only lasting clusters need."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from ray._private import node, parameter

from raysl.run.ray_forks import forked_workers
from raysl.run.variables import set_own_variables

OPTIONS: Mapping[str, Any] = {
    # Not the cluster, dead or a stranger's, that a file of an earlier Ray may name.
    "address": "local",
    "include_dashboard": False,
}
"""Arguments of ``ray.init``."""


@contextmanager
def own_ray() -> Iterator[None]:
    """Let ``ray.init`` start a Ray for this process and its children only."""
    set_own_variables()
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
