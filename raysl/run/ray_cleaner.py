"""Free the room of a controller that died, in a cluster that outlives its runs.

Ray Train starts an actor for each run that watches the controller, and removes the placement group
of the train workers if it dies. Ray 2.60 asks the dashboard of whatever Ray it finds on the
machine: if there are two, or it has no dashboard, the room is never freed, and the actor, some 100
MiB, stays (``findings/train_cleaner_beside_another_ray.sh``). Here it asks its own cluster.
"""

from typing import Any

import ray
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.execution.controller.placement_group_cleaner import (
    PlacementGroupCleaner,
)
from ray.util.state.exception import RayStateApiException


class OwnClusterCleaner(PlacementGroupCleaner):
    """Ray Train's cleaner, which asks the control store of its cluster."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        module: Any = placement_group_cleaner  # of this actor's process, which has nothing else
        module.is_actor_alive = _is_actor_alive


class OwnClusterCleanerCallback(PlacementGroupCleanerCallback):
    """Starts the cleaner of a run."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start the cleaner in place of Ray Train's."""
        module: Any = placement_group_callback
        module.PlacementGroupCleaner = OwnClusterCleaner
        try:
            super().after_controller_start(train_run_context)
        finally:
            module.PlacementGroupCleaner = PlacementGroupCleaner


def _is_actor_alive(actor_id: str, timeout: float) -> bool:
    try:
        actor: Any = ray._private.state.actors(actor_id)
    except Exception as error:  # the store is away; it may come back
        raise RayStateApiException(str(error)) from None
    return bool(actor.get("State", "DEAD") != "DEAD")
