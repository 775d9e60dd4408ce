"""Nodes that train and nodes that make views: what is asked of them, and how they are divided."""

from typing import Any

import pytest

from raysl.config.load import validated
from raysl.errors import ClusterError
from raysl.run import ray_preflight
from raysl.run.cluster_config import ClusterConfig
from raysl.run.nodes import ANYWHERE, Labels, Node, Nodes, Roles, has_labels
from raysl.run.ray_cluster import ClusterNeeds, Layout, layout_for
from raysl.run.ray_preflight import check_store, roles_lines, wait_for_roles
from raysl.run.recipe import RunConfig, run_from_values
from raysl.run.scaling import Pace, WorkerCounts

TRAIN, VIEWS = {"role": "train"}, {"role": "views"}
APART = Roles(TRAIN, VIEWS)
MIB = 1 << 20


def node(cpus: float, labels: Labels | None = None, *, gpus: float = 0.0, name: str = "") -> Node:
    return Node(name or f"{(labels or {}).get('role', 'any')}-node", cpus, gpus, "id", labels or {})


@pytest.mark.parametrize(
    ("wanted", "found"),
    [  # as Ray 2.60 placed tasks and placement groups on such nodes
        ({"role": "train"}, "train"),
        ({"role": "!train"}, "views none"),
        ({"role": "in(train, views)"}, "train views"),
        ({"role": "in(train,x)"}, "train"),
        ({"role": "!in(train,views)"}, "none"),
        ({"role": "views", "zone": "b"}, "views"),
        ({"role": "views", "zone": "a"}, ""),
        ({"other": "!x"}, "train views none"),
        ({"other": "x"}, ""),
        (None, "train views none"),
    ],
)
def test_a_node_has_labels_as_ray_decides_it(wanted: Labels | None, found: str) -> None:
    labels = {"train": {"role": "train", "zone": "a"}, "views": {"role": "views", "zone": "b"}}
    nodes = [node(1.0, labels.get(name), name=name) for name in ("train", "views", "none")]
    assert " ".join(each.name for each in nodes if has_labels(each, wanted)) == found


@pytest.mark.parametrize(
    ("roles", "nodes", "counts", "expected"),
    [  # workers, CPUs of each, data workers, CPUs of each, threads
        (APART, [node(4, TRAIN), node(8, VIEWS), node(8, VIEWS)], (2,), (2, 1.0, 16, 0.99, 2)),
        # Train workers leave no CPU to views, which other nodes make.
        (APART, [node(2, TRAIN), node(2, VIEWS)], (2,), (2, 1.0, 2, 0.98, 1)),
        (APART, [node(1, TRAIN), node(2, VIEWS)], (2,), (2, 0.5, 2, 0.98, 1)),
        # A range counts nodes that train only, and the head neither way.
        (
            APART,
            [node(0), node(1, TRAIN), node(1, TRAIN), node(9, VIEWS)],
            (1, 2, 4),
            (2, 1.0, 9, 0.99, 1),
        ),
        (Roles(TRAIN, None), [node(2, TRAIN), node(4)], (1,), (1, 1.0, 5, 0.99, 2)),
        # Train workers may be on nodes that make views, so as many CPUs are left out.
        (Roles(None, VIEWS), [node(4, VIEWS), node(2)], (2,), (2, 1.0, 2, 0.98, 2)),
        (Roles(TRAIN, TRAIN), [node(4, TRAIN), node(8)], (1,), (1, 1.0, 3, 0.99, 4)),
        (ANYWHERE, [node(4, TRAIN), node(8)], (1,), (1, 1.0, 11, 0.99, 4)),
    ],
)
def test_nodes_are_divided_by_their_roles(
    roles: Roles,
    nodes: list[Node],
    counts: tuple[int, ...],
    expected: tuple[int, float, int, float, int],
) -> None:
    found = layout_for(ClusterNeeds(counts, "cpu", None, None, None, roles), nodes)
    assert expected == (
        found.num_train_workers,
        found.cpus_per_train_worker,
        found.num_data_workers,
        found.cpus_per_data_worker,
        found.threads_per_train_worker,
    )
    assert found.num_nodes == len(roles.members(nodes))


class TestGpus:
    def test_are_trained_on_without_any_label(self) -> None:
        nodes = [node(0, name="head"), node(8, gpus=1), node(16)]
        found = layout_for(ClusterNeeds((1,), "auto", None, None, None), nodes)
        assert (found.use_gpu, found.num_data_workers) == (True, 23)
        assert found.threads_per_train_worker == 8  # not those of the head, which trains nothing

    def test_of_other_nodes_do_not_count(self) -> None:
        nodes = [node(8, TRAIN), node(8, VIEWS, gpus=4)]
        found = layout_for(ClusterNeeds((2,), "auto", None, None, None, APART), nodes)
        assert (found.use_gpu, found.spare_gpus) == (False, 0)
        with pytest.raises(ClusterError, match=r"the nodes of cluster.train_on=\{role: train\} ha"):
            layout_for(ClusterNeeds((2,), "cuda", None, None, None, APART), nodes)

    def test_that_are_spare_are_those_of_nodes_that_train(self) -> None:
        nodes = [node(8, TRAIN, gpus=2), node(8, VIEWS, gpus=4)]
        found = layout_for(ClusterNeeds((1,), "auto", None, None, None, APART), nodes)
        assert (found.use_gpu, found.spare_gpus, found.spare_cpus) == (True, 1, 7)


class TestNodesOfARole:
    def test_that_are_not_there_are_asked_for_with_the_labels_there_are(self) -> None:
        nodes = [node(4, VIEWS), node(4, {"ray.io/node-id": "a", "ray.io/node-group": "gpu"})]
        with pytest.raises(ClusterError) as caught:
            layout_for(ClusterNeeds((1,), "cpu", None, None, None, APART), nodes)
        assert str(caught.value) == (
            "the cluster has no place for this run, which needs a node of cluster.train_on={role: "
            "train}: views-node has {role: views}; any-node has {ray.io/node-group: gpu}"
        )
        assert APART.missing([node(4, TRAIN), node(4)]) == (
            "a node of cluster.data_on={role: views}: train-node has {role: train}; any-node has "
            "no labels"
        )
        assert APART.missing([node(4, TRAIN), node(4, VIEWS)]) is None

    def test_that_ray_data_does_not_count_make_no_views(self) -> None:
        nodes = [node(4, {"ray-subcluster": "a"})]
        assert "without the label ray-subcluster" in (ANYWHERE.missing(nodes) or "")
        assert Roles(None, {"ray-subcluster": "a"}).missing(nodes) is None

    def test_without_room_are_the_only_ones_that_a_run_waits_for(self) -> None:
        decided = ClusterNeeds((2,), "cpu", 1.0, None, None, APART)
        counts = WorkerCounts(decided, Pace(300.0), lambda: 0.0)
        all_, free = [node(2, TRAIN), node(8, VIEWS)], [node(1, TRAIN), node(8, VIEWS)]
        assert counts.at_start(Nodes(all_, free)) is None
        assert counts.missing(Nodes(all_, free)) == (
            "waits for room for 1 of 2 train workers, 1 CPUs each, on the nodes of "
            "cluster.train_on={role: train}: train-node has 1 of 2 CPUs free"
        )
        free = [node(2, TRAIN), node(0, VIEWS)]
        assert counts.at_start(Nodes(all_, free)) is None
        assert counts.missing(Nodes(all_, free)).endswith(
            "on the nodes of cluster.data_on={role: views}: views-node has 0 of 8 CPUs free"
        )
        lost = Nodes(all_[1:], all_[1:])
        assert counts.at_start(lost) is None
        assert counts.missing(lost).startswith("waits for a node of cluster.train_on={role: train}")
        assert counts.at_start(Nodes(all_, all_)) == 2


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "name at least one label"),
        ({"role": "in()"}, "'in()' is no value of a label"),
        ({"role": "!!a"}, "'!!a' is no value"),
        ({"role": "(a)"}, "'(a)' is no value"),
        ({"role": ""}, "'' is no value"),
        ({"a b": "c"}, "'a b' is no name of a label"),
        ({"ray-subcluster": "in(a, b)"}, "Ray Data looks only for one value"),
        ({"role": 3}, "takes text"),
    ],
)
def test_labels_that_ray_would_not_take_are_refused(given: object, problem: str) -> None:
    problems = validated(ClusterConfig, {"train_on": given})
    assert isinstance(problems, list)
    (found,) = problems
    assert found.text.startswith("train_on: ")
    assert problem in found.text


def run_of(**cluster: Any) -> RunConfig[Any]:
    values = {
        "name": "a",
        "data": {"source": "digits"},
        "method": {"name": "simclr"},
        "train": {"epochs": 1, "global_batch_size": 64},
        "cluster": cluster,
    }
    return run_from_values(values, where="test")


class TestBeforeTheFirstWorker:
    def test_a_run_waits_for_its_nodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        there = [[node(4)], [node(4), node(4, TRAIN)]]
        looks = iter([there[0], there[0], there[1]])
        monkeypatch.setattr(ray_preflight, "all_nodes", lambda: next(looks))
        monkeypatch.setattr(ray_preflight, "_POLL_S", 0.0)
        wait_for_roles(run_of(train_on=TRAIN))
        assert next(looks, None) is None

    def test_but_not_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_preflight, "all_nodes", lambda: [node(4, VIEWS)])
        monkeypatch.setattr(ray_preflight, "_POLL_S", 0.01)
        with pytest.raises(ClusterError) as caught:
            wait_for_roles(run_of(train_on=TRAIN, max_wait_s=0.05))
        assert str(caught.value).startswith(
            "the run waits for a node of cluster.train_on={role: train}: views-node has {role: "
            "views}. It waited for 0 s, longer than cluster.max_wait_s=0.05"
        )

    def test_it_names_the_nodes_of_each_role(self) -> None:
        nodes = [node(4, TRAIN), *[node(4, VIEWS, name=f"v{n}") for n in range(7)]]
        layout = Layout(1, 1.0, 1, 1.0, False, 1, 8)
        assert roles_lines(ANYWHERE, nodes, layout) == []
        assert roles_lines(APART, nodes, layout) == [
            "trains on train-node; makes views on v0, v1, v2, v3, v4 and 2 more"
        ]

    def test_the_store_of_the_nodes_that_make_views_must_hold_them(self) -> None:
        layout = Layout(2, 1.0, 3, 1.0, False, 1, 1)
        check_store({"data": 100 * MIB}, 100 * MIB, layout, asked=APART.of_data)
        with pytest.raises(ClusterError) as caught:
            check_store({"data": 100 * MIB}, 99 * MIB, layout, asked=APART.of_data)
        assert str(caught.value).startswith(
            "views in flight need 100 MiB of object store, and the nodes of cluster.data_on={role: "
            "views} have 99 MiB: 3 data workers make 100 MiB. Lower"
        )
