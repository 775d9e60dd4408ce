"""Train workers and data workers on nodes with labels; a node that is lost or was never there."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from raysl.cli import main
from raysl.run.ray_notes import Notes
from raysl.track.run_folder import RunFolder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("no_ray_cluster", "undrawn"),
]

PATIENCE_S = 600.0
KINDS = ("RayTrainWorker", "MakeItems")
# Both train workers take all of their node, which they could not if it made views too.
SETTINGS = ["cluster.num_train_workers=2", "cluster.cpus_per_train_worker=1"]
SETTINGS += ["cluster.train_on={role: train}", "cluster.data_on={role: '!train'}"]
SETTINGS += ["train.steps=100000", "evaluate.every=null", "health.max_step_s=null"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head of two CPUs without labels, and a node of two CPUs that trains."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # A start that counts on the lost node is given up soon, as outside of the tests.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    monkeypatch.setattr("raysl.run.waiting._SAY_AFTER_S", 1.0)
    monkeypatch.setattr("raysl.run.ray_train._LOOK_EVERY_S", 0.2)
    node = {"num_cpus": 2, "object_store_memory": 150 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    cluster.add_node(**node, labels={"role": "train"})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def places(actors: Any) -> dict[str, set[str]]:
    """Return the nodes of the train workers and data workers that run."""
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for actor in actors:
        for kind in KINDS:
            if kind in actor["ActorClassName"] and actor["State"] == "ALIVE":
                found[kind].add(actor["Address"]["NodeID"])
    return found


def until(is_so: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_each_kind_of_worker_is_on_its_nodes_and_a_run_without_them_says_what_it_waits_for(
    cluster: Cluster, run_yaml: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = str(run_yaml("roles")), RunFolder(Path("runs/roles").absolute())
    statuses: list[int] = []
    training = threading.Thread(
        target=lambda: statuses.append(main(["pretrain", config, *SETTINGS]))
    )
    training.start()
    found: dict[str, set[str]] = {}

    def are_placed() -> bool:
        nonlocal found
        found = places(ray._private.state.actors().values())
        return not training.is_alive() or all(found.values())

    until(are_placed)
    train, views = (
        {n["NodeID"] for n in ray.nodes() if n["Labels"].get("role") == role}
        for role in ("train", None)
    )
    assert found == {"RayTrainWorker": train, "MakeItems": views}

    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "the run waits for a node of cluster.train_on={role: train}: " in said

    until(is_said)
    assert "trains on " in said  # by the check of the nodes
    assert "has no labels" in said
    Notes(str(folder.path)).ask_to_stop()
    training.join()
    assert statuses == [1]  # signals reach only a main thread
    assert "stopped while it waited for room" in capsys.readouterr().err

    assert main(["pretrain", config, *SETTINGS, "cluster.max_wait_s=1"]) == 1
    ending = capsys.readouterr().err.partition("ClusterError")[2]
    assert "the run waits for a node of cluster.train_on={role: train}: " in ending
    assert "longer than cluster.max_wait_s=1" in ending
