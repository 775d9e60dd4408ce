"""The actor that frees the room of a dead controller needs no dashboard, and ends afterwards."""

import time
from typing import Any

import pytest

pytestmark = pytest.mark.ray


def wait_for(condition: Any, *, limit_s: float = 30.0) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.usefixtures("ray_cluster")
def test_frees_the_room_of_a_controller_that_died_and_ends() -> None:
    import ray
    from ray.util import placement_group, placement_group_table

    from raysl.run.ray_cleaner import OwnClusterCleaner

    def state(actor: Any) -> str:
        found: Any = ray._private.state.actors(actor._actor_id.hex())
        return str(found["State"])

    @ray.remote(num_cpus=0)
    class Controller:
        def start(self) -> None: ...

    controller = Controller.remote()
    ray.get(controller.start.remote())
    group = placement_group([{"CPU": 0.01}])
    cleaner: Any = ray.remote(num_cpus=0)(OwnClusterCleaner)
    cleaner = cleaner.options(lifetime="detached").remote(
        controller_actor_id=controller._actor_id.hex(),
        check_interval_s=0.2,
        get_actor_timeout_s=5,
        stop_timeout=5,
    )
    ray.get([cleaner.start_monitoring.remote(), cleaner.register_placement_group.remote(group)])
    time.sleep(1)  # it looks a few times
    assert state(cleaner) == "ALIVE"
    assert placement_group_table(group)["state"] == "CREATED"
    ray.kill(controller)
    assert wait_for(lambda: placement_group_table(group)["state"] == "REMOVED")
    assert wait_for(lambda: state(cleaner) == "DEAD")


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_in_a_lasting_cluster_starts_it_in_place_of_ray_train_s() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Controller:
        def start(self) -> str:
            from types import SimpleNamespace

            from raysl.run.ray_cleaner import OwnClusterCleanerCallback

            self.callback = OwnClusterCleanerCallback()
            self.callback.after_controller_start(SimpleNamespace(run_id="run"))
            cleaner: Any = self.callback._cleaner
            return str(cleaner._actor_id.hex())

        def end(self) -> None:
            self.callback.before_controller_abort()

    controller = Controller.remote()
    cleaner = ray.get(controller.start.remote())
    found: Any = ray._private.state.actors(cleaner)
    assert found["ActorClassName"] == "OwnClusterCleaner"
    ray.get(controller.end.remote())
    assert wait_for(lambda: ray._private.state.actors(cleaner)["State"] == "DEAD")
