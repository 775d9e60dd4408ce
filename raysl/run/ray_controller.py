"""Run Ray Train's controller, and start it again if its process ends.

Ray Train replaces train workers that fail, but its controller is one process that nobody replaces.
Workers and streams end with it, so another one resumes the run from its last checkpoint.
"""

import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raysl.errors import ClusterError, counted
from raysl.run.ray_cluster import started_here
from raysl.run.ray_errors import last_line

T = TypeVar("T")

_ENDS_WITHIN_S = 60.0
_POLL_S = 0.25
_REMEDY = "The same command resumes from the last checkpoint"
_GONE: Collection[str] = ("REMOVED", "INFEASIBLE")


def run_controller(
    run: Callable[[], T],
    *,
    most_failures: int,
    is_over: Callable[[], bool],
    head_answers: Callable[[], bool],
    tell: Callable[[str], None],
) -> T:
    """Run a controller to its end; start another one each time its process ends too early.

    Args:
        run: Starts a controller and returns its result.
        most_failures: How often another one is started.
        is_over: Whether the command ends, or is to stop, so that no other one may start.
        head_answers: Whether the control store answers; raises ClusterError if it is gone.
        tell: Receives a line about each new start.

    Raises:
        ClusterError: If the process ended once more or cannot be shown to have ended, or if Ray
            failed.
    """
    failures = 0
    while True:
        try:
            return run()
        except ray.exceptions.RayActorError as error:
            failures += 1
            if is_over() or failures > most_failures:
                raise ClusterError(
                    f"Ray Train's controller, a process on this machine, ended early "
                    f"{counted(failures, 'time')} (cluster.max_failures={most_failures}): "
                    f"{last_line(error)}. {_REMEDY}"
                ) from None
            _wait_for_end(error.actor_id, head_answers)
            _free_room()
            tell("Ray Train's controller ended; another one starts from the last checkpoint")
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray failed: {last_line(error)}. {_REMEDY}") from None


def _wait_for_end(actor_id: str | None, head_answers: Callable[[], bool]) -> None:
    """Wait until a controller has ended: two would train into one folder."""
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while actor_id is not None and time.monotonic() < deadline:
        if head_answers():
            actor: Any = ray._private.state.actors(actor_id)
            if actor.get("State", "DEAD") == "DEAD":
                return
        time.sleep(_POLL_S)
    raise ClusterError(
        f"Ray Train's controller does not answer, and Ray does not say that its process has ended. "
        f"{_REMEDY}"
    )


def _free_room() -> None:
    """Free what the train workers of the ended controller held, in a Ray of our own.

    In a lasting cluster :mod:`raysl.run.ray_cleaner` does it.
    """
    if not started_here():
        return
    for group_id, group in ray.util.placement_group_table().items():
        if group["state"] not in _GONE:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))
