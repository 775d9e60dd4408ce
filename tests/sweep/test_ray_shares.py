"""How many trials at a time follows from the cluster and from what one takes."""

from typing import Any, ClassVar
from unittest.mock import patch

import pytest

from raysl.errors import ClusterError
from raysl.run.recipe import RunConfig, run_from_values
from raysl.sweep.config import ResourcesConfig, SweepConfig
from raysl.sweep.ray_shares import Shares, plan_shares


def run_of(**cluster: Any) -> RunConfig[Any]:
    values = {
        "name": "0000",
        "data": {"source": "digits"},
        "method": {"name": "simclr"},
        "train": {"epochs": 1, "global_batch_size": 64},
        "cluster": cluster,
    }
    return run_from_values(values, where="test")


def shares(
    *nodes: dict[str, float],
    resources: dict[str, float] | None = None,
    most_trials: int = 100,
    **cluster: Any,
) -> Shares:
    sweep = SweepConfig(
        name="s", base=("base.yaml",), resources=ResourcesConfig(**(resources or {}))
    )
    alive = [
        {"Alive": True, "Resources": node, "Labels": {"role": node.pop("role", "none")}}
        for node in map(dict, nodes)
    ]
    kinds = {"CPU", "GPU"} & {key for node in nodes for key in node}
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in kinds}
    with (
        patch("raysl.sweep.ray_shares.ray.nodes", return_value=alive),
        patch("raysl.sweep.ray_shares.ray.cluster_resources", return_value=total),
        patch("raysl.run.ray_cluster.ray.nodes", return_value=alive),
        patch("raysl.run.ray_cluster.ray.cluster_resources", return_value=total),
    ):
        return plan_shares(sweep, [run_of(**cluster)], most_trials=most_trials)


class TestWithoutGpus:
    def test_each_cpu_runs_a_trial(self) -> None:
        assert shares({"CPU": 2.0})[:3] == (2, 1.0, 0.0)
        assert shares({"CPU": 8.0}, {"CPU": 4.0})[:3] == (12, 1.0, 0.0)

    def test_fewer_trials_at_a_time_share_the_cpus_out(self) -> None:
        assert shares({"CPU": 8.0}, resources={"trials_at_a_time": 2})[:3] == (2, 4.0, 0.0)

    def test_no_more_run_than_there_are(self) -> None:
        assert shares({"CPU": 64.0}, most_trials=5).at_a_time == 5

    def test_a_trial_stays_on_one_node(self) -> None:
        two = shares({"CPU": 3.0}, {"CPU": 3.0}, resources={"cpus_per_trial": 2.0})
        assert two.at_a_time == 2

    def test_a_limit_holds_although_more_would_fit(self) -> None:
        some = shares({"CPU": 8.0}, resources={"trials_at_a_time": 2, "cpus_per_trial": 1.0})
        assert some.at_a_time == 2
        assert 3 * some.cpus > 8  # what two reserve leaves no room for a third

    def test_a_trial_larger_than_any_node_is_refused(self) -> None:
        with pytest.raises(ClusterError, match=r"16 CPU, more than any node.*cpus_per_trial"):
            shares({"CPU": 8.0}, {"CPU": 12.0}, resources={"cpus_per_trial": 16.0})


class TestWithGpus:
    NODE: ClassVar[dict[str, float]] = {"CPU": 16.0, "GPU": 4.0}

    def test_each_gpu_runs_a_trial_with_its_share_of_the_cpus(self) -> None:
        assert shares(self.NODE)[:3] == (4, 4.0, 1.0)

    def test_trials_may_share_a_gpu(self) -> None:
        assert shares(self.NODE, resources={"gpus_per_trial": 0.25})[:3] == (16, 1.0, 0.25)

    def test_a_share_that_does_not_divide_a_gpu_leaves_the_rest_of_it(self) -> None:
        assert shares(self.NODE, resources={"gpus_per_trial": 0.4}).at_a_time == 8

    def test_trials_on_cpu_leave_the_gpus_alone(self) -> None:
        assert shares(self.NODE, device="cpu")[:3] == (16, 1.0, 0.0)


class TestNested:
    def test_as_many_as_the_cpus_of_their_workers_allow(self) -> None:
        found = shares({"CPU": 12.0}, num_train_workers=2, num_data_workers=2, device="cpu")
        assert found.nested
        assert found.at_a_time == 3

    def test_one_that_takes_all_that_is_left_is_alone_and_says_so(self) -> None:
        found = shares({"CPU": 12.0}, num_train_workers=2, device="cpu")
        assert found.at_a_time == 1
        assert "cluster.num_data_workers" in found.why

    def test_one_that_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ClusterError, match="leave none of the cluster's 2 CPUs"):
            shares({"CPU": 2.0}, num_train_workers=2, cpus_per_train_worker=1.0, device="cpu")


class TestRoles:
    def test_of_trials_in_tunes_processes_are_refused(self) -> None:
        with pytest.raises(ClusterError, match=r"train_on and cluster.data_on: a trial with one"):
            shares({"CPU": 2.0}, train_on={"role": "train"})

    def test_of_trials_with_own_workers_count_their_nodes(self) -> None:
        roles = {"train_on": {"role": "train"}, "data_on": {"role": "!train"}}
        workers = {"num_train_workers": 2, "num_data_workers": 2, "device": "cpu"}
        nodes: list[Any] = [{"CPU": 5.0, "role": "train"}, {"CPU": 64.0}]
        assert shares(*nodes, **workers, **roles).at_a_time == 2
        assert shares(*nodes, **workers).at_a_time == 17


def test_the_reason_names_what_a_trial_takes_and_what_there_is() -> None:
    assert shares({"CPU": 2.0}).why == "2 at a time: a trial takes 1 CPU, the cluster has 2 CPUs"
