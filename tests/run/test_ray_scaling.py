"""Ray Train's policy of a run, with stand-ins for Ray: what it decides, says and raises."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from raysl.augment.crop import Crop
from raysl.augment.pipeline import View
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.errors import ClusterError, RunFolderError, StoppedError
from raysl.run import ray_cluster, ray_data, ray_scaling
from raysl.run.nodes import Node, Nodes
from raysl.run.ray_cluster import ClusterNeeds
from raysl.run.ray_scaling import RunFailures, RunScaling, TellWorkers
from raysl.run.ray_train import _own_or_cluster_error
from raysl.run.scaling import Pace
from raysl.run.waiting import Note, Patience
from raysl.track.run_folder import RunFolder, checkpoint_path, latest_step

RESOURCES = {"CPU": 1.0}


class Ray:
    """Stands for the cluster, the store of notes, the clock and the coordinator of Ray."""

    def __init__(self) -> None:
        self.now = 0.0
        self.nodes = nodes(2.0)
        self.note: Note | None = None
        self.is_to_stop = False
        self.requested: list[int] = []
        self.actors: list[dict[str, Any]] = []


def nodes(*cpus: float, free: tuple[float, ...] | None = None) -> Nodes:
    def of(each: tuple[float, ...]) -> list[Node]:
        return [Node(f"10.0.0.{n}", value, 0.0, f"id {n}") for n, value in enumerate(each)]

    return Nodes(of(cpus), of(cpus if free is None else free))


@pytest.fixture
def ray_(monkeypatch: pytest.MonkeyPatch) -> Ray:
    state = Ray()
    notes = SimpleNamespace(
        write=lambda phase, text: setattr(state, "note", Note(phase, text)),
        read=lambda: state.note,
        is_to_stop=lambda: state.is_to_stop,
    )
    clock = SimpleNamespace(
        monotonic=lambda: state.now, sleep=lambda s: setattr(state, "now", state.now + s)
    )
    monkeypatch.setattr(ray_scaling, "Notes", lambda _: notes)
    monkeypatch.setattr(ray_scaling, "time", clock)
    monkeypatch.setattr(
        ray_scaling, "Patience", lambda limit: Patience(limit, clock=clock.monotonic)
    )
    monkeypatch.setattr(ray_scaling, "_held_nodes", [])
    monkeypatch.setattr(ray_scaling, "nodes_now", lambda: state.nodes)
    monkeypatch.setattr(ray_scaling, "data_worker_actors", lambda: state.actors)
    request = RunScaling._get_num_workers_for_resource_request
    monkeypatch.setattr(RunScaling, "_maybe_send_resource_request", lambda _: None)
    monkeypatch.setattr(
        RunScaling, "_send_resource_request", lambda self: state.requested.append(request(self))
    )
    return state


def policy(folder: Path, *counts: int, max_wait_s: float | None = 60.0) -> RunScaling:
    is_fixed = len(counts) == 1
    return RunScaling(
        ScalingConfig(
            num_workers=counts[0] if is_fixed else (counts[0], counts[-1]),
            resources_per_worker=RESOURCES,
        ),
        needs=ClusterNeeds(counts, "cpu", 1.0, None, None),
        num_workers=counts[0],
        num_steps=100,
        newest_step=partial(latest_step, RunFolder(folder).checkpoints),
        run=str(folder),
        pace=Pace(resize_every_s=0.0),
        max_wait_s=max_wait_s,
    )


def started(*places: str) -> Any:
    """Return the state of train workers that have started on some nodes."""
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=place)) for place in places]
    dataset: Any = SimpleNamespace(num_workers=1)
    TellWorkers(dataset).after_worker_group_start(SimpleNamespace(get_workers=lambda: workers))
    return SimpleNamespace(num_workers=len(workers))


class TestAStart:
    def test_with_room_is_made_at_once(self, ray_: Ray, tmp_path: Path) -> None:
        found = policy(tmp_path, 1).make_decision_for_non_running_worker_group()
        assert found == ResizeDecision(1, RESOURCES)
        assert ray_.note == Note("start", "starts 1 train worker")
        assert (ray_.now, ray_.requested) == (0.0, [])

    def test_without_room_waits_says_so_and_ends(self, ray_: Ray, tmp_path: Path) -> None:
        fixed = policy(tmp_path, 2)
        while ray_.now <= 60:
            assert fixed.make_decision_for_non_running_worker_group() == NoopDecision()
        assert ray_.note is not None
        assert ray_.note.text.startswith("waits for room for CPUs to make views, besides 2 train")
        with pytest.raises(ClusterError, match=r"besides 2 train workers.*waited for 60 s"):
            fixed.make_decision_for_non_running_worker_group()

    def test_waits_for_ever_if_told_so(self, ray_: Ray, tmp_path: Path) -> None:
        patient = policy(tmp_path, 2, max_wait_s=None)
        for _ in range(1000):
            assert patient.make_decision_for_non_running_worker_group() == NoopDecision()
        ray_.nodes = nodes(2.0, 2.0)
        found = patient.make_decision_for_non_running_worker_group()
        assert found == ResizeDecision(2, RESOURCES)

    def test_that_finds_no_room_again_and_again_ends_too(self, ray_: Ray, tmp_path: Path) -> None:
        fixed = policy(tmp_path, 1)  # a node that is lost, but still counted
        for _ in range(4):
            assert fixed.make_decision_for_non_running_worker_group() == ResizeDecision(
                1, RESOURCES
            )
            ray_.now += 20.0
        with pytest.raises(ClusterError, match="waited for 80 s"):
            fixed.make_decision_for_non_running_worker_group()

    def test_that_waits_ends_when_it_is_asked_to_stop(self, ray_: Ray, tmp_path: Path) -> None:
        fixed = policy(tmp_path, 2)
        ray_.is_to_stop = True
        with pytest.raises(StoppedError, match="while it waited for room"):
            fixed.make_decision_for_non_running_worker_group()

    def test_with_another_number_is_told_and_reaches_ray_data(
        self, ray_: Ray, tmp_path: Path
    ) -> None:
        elastic = policy(tmp_path, 1, 2, 4)
        ray_.nodes = nodes(2.0, 2.0)
        found = elastic.make_decision_for_non_running_worker_group()
        assert found == ResizeDecision(2, RESOURCES)
        assert ray_.note == Note("resize", "starts 2 train workers instead of 1")
        assert ray_.requested == [2]
        ray_.nodes = nodes(2.0)  # a node is lost
        found = elastic.make_decision_for_non_running_worker_group()
        assert found == ResizeDecision(1, RESOURCES)
        assert ray_.requested == [2, 1]

    def test_after_a_failure_has_the_room_that_ray_train_still_holds_for_the_dead(
        self, ray_: Ray, tmp_path: Path
    ) -> None:
        fixed = policy(tmp_path, 1)
        assert fixed.make_decision_for_non_running_worker_group() == ResizeDecision(1, RESOURCES)
        started("id 0")
        ray_.nodes = nodes(2.0, free=(0.0,))
        ray_.actors = [{"State": "ALIVE", "Address": {"NodeID": "id 0"}}]
        assert fixed.make_decision_for_non_running_worker_group() == ResizeDecision(1, RESOURCES)
        TellWorkers(SimpleNamespace()).after_worker_group_shutdown(None)  # type: ignore[arg-type]
        ray_.actors = []
        assert fixed.make_decision_for_non_running_worker_group() == NoopDecision()

    def test_of_fewer_has_the_room_of_those_whose_node_is_left(
        self, ray_: Ray, tmp_path: Path
    ) -> None:
        elastic = policy(tmp_path, 1, 2)
        ray_.nodes = nodes(2.0, 2.0)
        assert elastic.make_decision_for_non_running_worker_group() == ResizeDecision(2, RESOURCES)
        started("id 0", "id 1")
        ray_.nodes = nodes(2.0, free=(1.0,))
        assert elastic.make_decision_for_non_running_worker_group() == ResizeDecision(1, RESOURCES)
        assert ray_.now == 0.0


class TestRunningWorkers:
    def test_end_if_their_first_batch_does_not_come(self, ray_: Ray, tmp_path: Path) -> None:
        fixed = policy(tmp_path, 1)
        ray_.note = Note("first batch", "waits for the first batch of 1 data worker: ...")
        assert fixed.make_decision_for_running_worker_group(started("id 0"), None) == NoopDecision()
        ray_.now = 61.0
        with pytest.raises(ClusterError, match="the run waits for the first batch of 1 data"):
            fixed.make_decision_for_running_worker_group(started("id 0"), None)

    def test_go_on_for_as_long_as_they_wait_for_nothing(self, ray_: Ray, tmp_path: Path) -> None:
        fixed = policy(tmp_path, 1)
        for note in (None, Note("load", "waits"), None):
            ray_.note = note
            for _ in range(2):
                found = fixed.make_decision_for_running_worker_group(started("id 0"), None)
                assert found == NoopDecision()
                ray_.now += 59.0

    def test_become_more_after_the_next_checkpoint_but_not_after_the_last(
        self, ray_: Ray, tmp_path: Path
    ) -> None:
        elastic, alone = policy(tmp_path, 1, 2), started("id 0")
        ray_.nodes = nodes(2.0, 2.0, free=(0.0, 2.0))
        ray_.actors = [{"State": "ALIVE", "Address": {"NodeID": "id 0"}}]
        checkpoints = RunFolder(tmp_path).checkpoints
        found = [elastic.make_decision_for_running_worker_group(alone, None)]
        checkpoint_path(checkpoints, 10).mkdir(parents=True)
        found.append(elastic.make_decision_for_running_worker_group(alone, None))
        assert found == [NoopDecision(), ResizeDecision(2, RESOURCES)]
        assert ray_.requested == [2]
        for step in (100, 101):
            checkpoint_path(checkpoints, step).mkdir()
            at_the_end = elastic.make_decision_for_running_worker_group(alone, None)
            assert at_the_end == NoopDecision()

    def test_leave_a_node_to_the_job_that_holds_it(self, ray_: Ray, tmp_path: Path) -> None:
        elastic = policy(tmp_path, 1, 2)
        ray_.nodes = nodes(2.0, 2.0, free=(0.0, 0.0))
        for step in range(1, 4):
            checkpoint_path(RunFolder(tmp_path).checkpoints, step).mkdir(parents=True)
            found = elastic.make_decision_for_running_worker_group(started("id 0"), None)
            assert found == NoopDecision()


def test_the_dataset_is_told_how_many_workers_start() -> None:
    dataset: Any = SimpleNamespace(num_workers=1)
    TellWorkers(dataset).before_worker_group_start(SimpleNamespace(num_workers=3))
    assert dataset.num_workers == 3


def test_an_error_of_the_policy_is_raised_as_it_is() -> None:
    config: Any = SimpleNamespace(cluster=SimpleNamespace(max_failures=3))
    own = ClusterError("the run waits")
    assert _own_or_cluster_error(ControllerError(own), config) is own
    other = _own_or_cluster_error(ControllerError(ValueError("x")), config)
    assert "more often than cluster.max_failures=3" in str(other)


@pytest.mark.parametrize(
    ("is_elastic", "steps", "decisions"),
    [
        (True, (0, 0, 0), "RETRY RETRY RAISE"),
        (True, (0, 5, 9, 9, 9), "RETRY RETRY RETRY RETRY RAISE"),
        (False, (0, 5, 9), "RETRY RETRY RAISE"),
    ],
)
def test_lost_nodes_add_up_but_with_a_range_only_without_a_checkpoint_between_them(
    tmp_path: Path, is_elastic: bool, steps: tuple[int, ...], decisions: str
) -> None:
    folder = RunFolder(tmp_path)
    newest_step = partial(latest_step, folder.checkpoints)
    failures = RunFailures(
        FailureConfig(max_failures=2), newest_step=newest_step, is_elastic=is_elastic
    )
    lost = WorkerGroupError("a node was lost", {0: RuntimeError()})
    no_room = ControllerError(WorkerGroupStartupTimeoutError(2))
    found = []
    for step in steps:
        if step:
            checkpoint_path(folder.checkpoints, step).mkdir(parents=True, exist_ok=True)
        found.append(failures.make_decision(lost).value)
        assert failures.make_decision(no_room).value == "RETRY"
    assert " ".join(found) == decisions


class TestAStoreThatIsDown:
    """Each start would try it for a minute."""

    DOWN = UserExceptionWithTraceback(RunFolderError("s3://a: cannot be reached"), "a traceback")

    def test_ends_the_run_at_the_first_worker_that_gave_up(self) -> None:
        error = WorkerGroupError(
            "2 of 2", {0: UserExceptionWithTraceback(OSError(), ""), 1: self.DOWN}
        )
        failures = RunFailures(
            FailureConfig(max_failures=9), newest_step=lambda: 0, is_elastic=True
        )
        assert failures.make_decision(error).value == "RAISE"
        config: Any = SimpleNamespace(cluster=SimpleNamespace(max_failures=9))
        raised = _own_or_cluster_error(error, config)
        assert (type(raised), str(raised)) == (RunFolderError, "s3://a: cannot be reached")
        other = WorkerGroupError("1 of 2", {0: UserExceptionWithTraceback(ClusterError("x"), "")})
        assert failures.make_decision(other).value == "RETRY"

    def test_does_not_keep_the_controller_from_deciding(self, ray_: Ray, tmp_path: Path) -> None:
        def newest_step() -> int:
            raise RunFolderError("s3://a: cannot be reached")

        failures = RunFailures(
            FailureConfig(max_failures=1), newest_step=newest_step, is_elastic=True
        )
        lost = WorkerGroupError("a node was lost", {0: RuntimeError()})
        assert [failures.make_decision(lost).value for _ in range(2)] == ["RETRY", "RAISE"]
        elastic = policy(tmp_path, 1, 2)
        elastic._newest_step = newest_step
        ray_.nodes = nodes(2.0, 2.0, free=(0.0, 2.0))
        ray_.actors = [{"State": "ALIVE", "Address": {"NodeID": "id 0"}}]
        found = elastic.make_decision_for_running_worker_group(started("id 0"), None)
        assert found == NoopDecision()


def test_the_rest_of_a_run_is_opened_in_items_for_the_workers_that_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[tuple[int, int]] = []
    monkeypatch.setattr(ray_cluster, "all_nodes", lambda: nodes(8.0).all)
    monkeypatch.setattr(
        ray_data,
        "open_dataset",
        lambda _, plan, *__, layout, **___: opened.append(
            (plan.item_size, layout.num_train_workers)
        ),
    )
    dataset = ray_data.RemainingDataset(
        None,
        Plan([64], seed=0, global_batch_size=24, item_size=24, num_steps=2),
        BlockSpec((View(count=2, size_px=8, crop=Crop()),)),
        newest_step=lambda: 0,
        needs=ClusterNeeds((1, 2, 3), "cpu", 1.0, None, None),
    )
    for count in (1, 3, 2, 1):
        TellWorkers(dataset).before_worker_group_start(SimpleNamespace(num_workers=count))
        dataset()
    assert opened == [(24, 1), (8, 3), (12, 2), (24, 1)]
