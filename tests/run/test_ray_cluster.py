"""A run that does not fit the cluster is refused before it starts."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from raysl.data.plan import Plan
from raysl.errors import ClusterError
from raysl.run import ray_cluster, ray_data
from raysl.run.forks import SWITCH
from raysl.run.nodes import Node
from raysl.run.ray_cluster import Layout, connect, needs_of, plan_layout
from raysl.run.recipe import block_spec, load_run

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


def test_data_workers_are_planned_for_the_nodes_that_are_there_at_each_start(
    run_yaml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_cpus(cpus: float) -> None:
        nodes = [Node("here", cpus)]
        monkeypatch.setattr(ray_cluster, "all_nodes", lambda: nodes)

    config = load_run(run_yaml("nodes"), ["cluster={num_train_workers: 2}"])
    set_cpus(8.0)
    layout = plan_layout(config)
    assert (layout.num_data_workers, layout.cpus_per_train_worker) == (6, 1.0)
    opened: list[Layout] = []
    monkeypatch.setattr(ray_data, "open_dataset", lambda *_, layout, **__: opened.append(layout))
    open_rest = ray_data.RemainingDataset(
        None,
        Plan([64], seed=0, global_batch_size=32, item_size=32, num_steps=2),
        block_spec(config.data),
        newest_step=lambda: 0,
        needs=needs_of(config, layout),
    )
    for cpus in (8.0, 4.0, 16.0):
        set_cpus(cpus)
        open_rest()
    assert [each.num_data_workers for each in opened] == [6, 2, 14]
    assert {each.cpus_per_train_worker for each in opened} == {1.0}  # they run already
    set_cpus(2.0)  # where a new run would let its train workers take half of each CPU
    with pytest.raises(ClusterError, match="leave none of the cluster's 2 CPUs to make views"):
        open_rest()


def test_whatever_keeps_ray_from_starting_is_told_as_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray 2.60 raises a bare Exception where its start takes more than 30 s."""

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    ends: list[bool] = []
    monkeypatch.setenv(SWITCH, "0")  # a server would replace that of the Ray that tests share
    monkeypatch.setattr("raysl.run.ray_cluster.end_server", lambda: ends.append(True))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match=r"cannot connect to Ray.*timed out during startup"):
        connect()
    assert ends == [True]


_STRANGER = '''
import os, subprocess, sys
from raysl.run.ray_cluster import connect, disconnect
assert connect()
import ray
address = ray.get_runtime_context().gcs_address
assert ray.get(ray.remote(lambda: 7).remote()) == 7  # its own processes know the token
environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"}
environment["RAY_AUTH_MODE"] = "disabled"  # as somebody's Ray that knows no tokens; told at once
code = """import sys
from ray._raylet import GcsClient
print(GcsClient(sys.argv[1]).get_all_node_info())
"""
done = subprocess.run([sys.executable, "-c", code, address], env=environment, text=True,
                      capture_output=True, timeout=120)
print(done.returncode, done.stdout, done.stderr[-2000:])
import psutil
started = [" ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)]
print(*[name for name in started if "/ray/" in name], sep="\\n")
disconnect()
'''


def test_a_cluster_of_its_own_refuses_who_does_not_know_its_token_and_has_few_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", _STRANGER], text=True, capture_output=True, timeout=240, check=True
    )
    assert done.stdout.startswith("1 "), done.stdout
    assert "uthentication" in done.stdout
    for needed in ("gcs_server", "raylet/raylet"):
        assert needed in done.stdout
    for only_in_lasting_ones in ("dashboard/dashboard.py", "log_monitor.py", "/monitor.py"):
        assert only_in_lasting_ones not in done.stdout
    assert "NodeID" not in done.stdout
    assert not (tmp_path / ".ray").exists()  # a token there would be asked for by later clusters
