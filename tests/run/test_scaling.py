"""How many train workers a run has, by arithmetic: no Ray, no clock, no waiting."""

from collections.abc import Sequence

import pytest

from raysl.errors import ClusterError
from raysl.run.nodes import Node, Nodes, describe_nodes
from raysl.run.ray_cluster import ClusterNeeds, layout_for
from raysl.run.scaling import Pace, WorkerCounts, with_held

Held = Sequence[tuple[str, float, float]]
PACE = Pace(resize_every_s=300.0, settle_s=15.0, stuck_s=30.0)


def needs(*counts: int, device: str = "cpu", cpus: float | None = 1.0) -> ClusterNeeds:
    return ClusterNeeds(counts, device, cpus, None, None)


def cluster(*cpus: float, free: Sequence[float] | None = None, gpus: int = 0) -> Nodes:
    names = [f"10.0.0.{number}" for number in range(len(cpus))]
    ids = [f"id {number}" for number in range(len(cpus))]
    free = cpus if free is None else free
    return Nodes(
        [Node(*each) for each in zip(names, cpus, [gpus] * len(cpus), ids, strict=True)],
        [Node(*each) for each in zip(names, free, [gpus] * len(cpus), ids, strict=True)],
    )


def go_on(
    counts: WorkerCounts, nodes: Nodes, *, current: int, step: int, held: Held | None = None
) -> int | None:
    """Ask running workers; without what they hold, they have the cluster for themselves."""
    room = nodes.all if held is None else with_held(nodes, held)
    return counts.while_running(nodes, current=current, step=lambda: step, room=lambda: room)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestTheLayout:
    @pytest.mark.parametrize(
        ("cpus", "workers", "data_workers"),
        [
            ((2.0,), 1, 1),
            ((2.0, 2.0), 2, 2),  # three would leave one CPU for views, but do not divide the batch
            ((4.0, 1.0), 4, 1),
            ((8.0, 8.0), 4, 12),
        ],
    )
    def test_has_the_most_workers_that_divide_the_batch_and_leave_cpus_for_views(
        self, cpus: tuple[float, ...], workers: int, data_workers: int
    ) -> None:
        found = layout_for(needs(1, 2, 4), cluster(*cpus).all)
        assert (found.num_train_workers, found.num_data_workers) == (workers, data_workers)

    @pytest.mark.parametrize(
        ("cpus", "counts", "workers", "each"),
        [
            (2.0, (1, 2, 4), 1, 1.0),
            (1.0, (1, 2, 4), 1, 0.5),
            (2.0, (2, 4), 2, 0.5),
            (8.0, (2, 4, 8), 4, 1.0),
        ],
    )
    def test_shares_few_cpus_only_between_the_fewest_workers(
        self, cpus: float, counts: tuple[int, ...], workers: int, each: float
    ) -> None:
        found = layout_for(needs(*counts, cpus=None), cluster(cpus).all)
        assert (found.num_train_workers, found.cpus_per_train_worker) == (workers, each)

    def test_has_a_gpu_for_each_worker(self) -> None:
        found = layout_for(needs(1, 2, 4, device="auto"), cluster(8.0, gpus=3).all)
        assert (found.num_train_workers, found.use_gpu) == (2, True)
        assert found.spare_gpus == 0  # a later start may need it
        # Four workers on CPU would be more, but a GPU is faster than three CPUs.
        found = layout_for(needs(1, 2, 4, device="auto"), cluster(8.0, gpus=1).all)
        assert (found.num_train_workers, found.use_gpu) == (1, True)

    @pytest.mark.parametrize(
        ("cpus", "workers", "each"),
        [
            ((2.0, 2.0, 2.0), 3, 0.5),  # each node has half a CPU left, so no node has a whole one
            ((2.0, 2.0), 1, 1.0),
            ((2.0, 4.0), 3, 1.0),
            ((2.0,), 1, 0.47),
        ],
    )
    def test_a_data_worker_fits_on_a_node_wherever_the_train_workers_are(
        self, cpus: tuple[float, ...], workers: int, each: float
    ) -> None:
        found = layout_for(needs(workers, cpus=1.5), cluster(*cpus).all)
        assert found.cpus_per_data_worker == each

    def test_a_worker_needs_its_cpus_on_one_node(self) -> None:
        halves = cluster(1.5, 1.5, 1.5).all
        assert layout_for(needs(1, 2, 4, cpus=1.0), halves).num_train_workers == 2
        with pytest.raises(ClusterError, match=r"room for 0 of 1 train workers of 2 CPUs each"):
            layout_for(needs(1, 2, cpus=2.0), halves)


class TestAStart:
    def test_takes_at_once_what_is_free(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1, 2, 4), PACE, clock)
        assert counts.at_start(cluster(3.0)) == 2

    def test_waits_a_little_for_what_workers_that_have_just_ended_still_hold(
        self, clock: Clock
    ) -> None:
        counts = WorkerCounts(needs(1, 2), PACE, clock)
        half = cluster(2.0, 2.0, free=(2.0, 0.0))
        assert counts.at_start(half) is None
        clock.now += 14
        assert counts.at_start(half) is None
        assert counts.at_start(cluster(2.0, 2.0)) == 2

    def test_then_starts_with_what_it_can_have(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1, 2), PACE, clock)
        half = cluster(2.0, 2.0, free=(2.0, 0.0))
        assert counts.at_start(half) is None
        clock.now += 15
        assert counts.at_start(half) == 1
        assert counts.at_start(half) is None  # the next start waits again

    def test_a_fixed_number_waits_for_all_of_them_and_says_for_what(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(2), PACE, clock)
        busy = cluster(2.0, 2.0, free=(1.0, 0.0))
        for _ in range(3):
            assert counts.at_start(busy) is None
            clock.now += 1000
        assert counts.missing(busy) == (
            "waits for room for 1 of 2 train workers, 1 CPUs each: 10.0.0.0 has 1 of 2 CPUs free; "
            "10.0.0.1 has 0 of 2 CPUs free"
        )
        assert counts.at_start(cluster(2.0, 2.0)) == 2

    def test_waits_for_cpus_that_make_views_too(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1), PACE, clock)
        full = cluster(2.0, free=(1.0,))
        assert counts.at_start(full) is None
        assert "CPUs to make views, besides 1 train worker of 1 CPUs" in counts.missing(full)

    def test_without_any_node_it_waits(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1), PACE, clock)
        assert counts.at_start(Nodes([], [])) is None
        assert counts.missing(Nodes([], [])).endswith("no node")


class TestRunningWorkers:
    def test_become_more_after_a_checkpoint_that_is_newer_than_the_node(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1, 2), PACE, clock)
        assert counts.at_start(cluster(2.0)) == 1
        more = cluster(2.0, 2.0, free=(0.0, 2.0))
        assert go_on(counts, more, current=1, step=4) is None  # too soon after the start
        clock.now += 300
        for _ in range(3):
            assert go_on(counts, more, current=1, step=4) is None  # no checkpoint yet
        assert go_on(counts, more, current=1, step=8) == 2

    def test_do_not_become_more_too_often(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1, 2, 4), PACE, clock)
        two = cluster(2.0, 2.0, free=(0.0, 2.0))
        clock.now += 300
        assert go_on(counts, two, current=1, step=4) is None
        assert go_on(counts, two, current=1, step=5) == 2
        assert counts.at_start(cluster(2.0, 2.0)) == 2
        four = cluster(2.0, 2.0, 4.0, free=(0.0, 0.0, 4.0))
        for step in (6, 7, 8):
            clock.now += 99
            assert go_on(counts, four, current=2, step=step) is None
        clock.now += 3
        assert go_on(counts, four, current=2, step=9) is None
        assert go_on(counts, four, current=2, step=10) == 4

    @pytest.mark.parametrize("nodes", [cluster(2.0), cluster(3.0), cluster(2.0, 2.0)])
    def test_stay_as_many_if_the_nodes_have_no_room_for_a_number_that_divides(
        self, clock: Clock, nodes: Nodes
    ) -> None:
        counts = WorkerCounts(needs(1, 4), PACE, clock)
        for step in range(5):
            clock.now += 300
            assert go_on(counts, nodes, current=1, step=step) is None

    def test_leave_other_jobs_what_they_hold(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1, 2), PACE, clock)
        busy = cluster(2.0, 2.0, free=(0.0, 0.0))
        held = [("id 0", 1.0, 0.0), ("id 0", 0.98, 0.0)]  # a train worker and a data worker
        for step in range(5):  # the second node is another job's
            clock.now += 300
            assert go_on(counts, busy, current=1, step=step, held=held) is None
        half = cluster(2.0, 2.0, free=(0.0, 1.0))
        assert [node.cpus for node in with_held(half, held)] == [1.98, 1.0]
        for step, count in ((8, None), (9, 2)):
            clock.now += 300
            assert go_on(counts, half, current=1, step=step, held=held) == count

    def test_give_up_cpus_at_once_that_data_workers_have_lost(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1, 2), PACE, clock)
        lost = cluster(2.0)  # the two train workers fill it
        assert go_on(counts, lost, current=2, step=4) is None
        clock.now += 29
        assert go_on(counts, lost, current=2, step=4) is None
        clock.now += 1
        assert go_on(counts, lost, current=2, step=4) == 1

    def test_a_node_that_is_only_late_changes_nothing(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(1, 2), PACE, clock)
        for nodes in (cluster(2.0), cluster(2.0, 2.0), cluster(2.0)):
            clock.now += 29
            assert go_on(counts, nodes, current=2, step=4) is None

    def test_a_fixed_number_never_changes(self, clock: Clock) -> None:
        counts = WorkerCounts(needs(2), PACE, clock)
        for nodes in (cluster(2.0), cluster(64.0)):
            clock.now += 1000
            assert go_on(counts, nodes, current=2, step=4) is None


def test_nodes_are_described_in_one_line_whatever_their_number() -> None:
    nodes = cluster(*[4.0] * 100, gpus=1)
    text = describe_nodes(nodes.all, nodes.free)
    assert text.startswith("10.0.0.0 has 4 of 4 CPUs free and 1 of 1 GPUs free; 10.0.0.1 has")
    assert describe_nodes(nodes.all[:1]) == "10.0.0.0 has 4 CPUs and 1 GPUs"
    assert text.endswith("; 92 more nodes")
    assert len(text) < 500
