"""A run that does not fit the cluster is refused before it starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from raysl.errors import ClusterError
from raysl.run.ray_cluster import connect, plan_layout
from raysl.run.recipe import load_run

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_cluster")
class TestPlanLayout:
    def test_train_workers_take_what_they_ask_for_and_data_workers_the_rest(
        self, run_yaml: Callable[[str], Path]
    ) -> None:
        overrides = ["cluster={num_train_workers: 1}"]
        found = plan_layout(load_run(run_yaml("fits"), overrides))
        assert (found.num_train_workers, found.num_data_workers) == (1, 3)
        total = found.cpus_per_train_worker + 3 * found.cpus_per_data_worker
        assert total < 4
        assert not found.use_gpu
        assert found.spare_cpus == found.spare_gpus == 0
        few = plan_layout(load_run(run_yaml("few"), [*overrides, "cluster.num_data_workers=1"]))
        assert few.spare_cpus == 1  # of 4, less the two workers' and what the read stage needs

    def test_workers_that_leave_no_cpu_for_views_are_refused(
        self, run_yaml: Callable[[str], Path]
    ) -> None:
        overrides = ["cluster={num_train_workers: 2, cpus_per_train_worker: 2.0}"]
        with pytest.raises(ClusterError, match=r"leave none of the cluster's 4 CPUs to make views"):
            plan_layout(load_run(run_yaml("full"), overrides))

    def test_as_many_workers_as_cpus_share_them_unless_told_otherwise(
        self, run_yaml: Callable[[str], Path]
    ) -> None:
        found = plan_layout(load_run(run_yaml("shared"), ["cluster={num_train_workers: 4}"]))
        assert found.cpus_per_train_worker == 0.5
        assert found.num_data_workers >= 1

    def test_gpus_that_are_not_there_are_refused(self, run_yaml: Callable[[str], Path]) -> None:
        overrides = ["cluster={num_train_workers: 2, device: cuda}"]
        with pytest.raises(ClusterError, match=r"needs 2 GPUs.*has 0"):
            plan_layout(load_run(run_yaml("gpus"), overrides))


def test_whatever_keeps_ray_from_starting_is_told_as_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray 2.60 raises a bare Exception where its start takes more than 30 s."""

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match=r"cannot connect to Ray.*timed out during startup"):
        connect()
