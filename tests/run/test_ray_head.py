"""A head that is gone is noticed before Ray ends the process because of it."""

import socket
from collections.abc import Iterator

import pytest
import ray

from raysl.errors import ClusterError
from raysl.run import ray_head
from raysl.run.ray_head import HeadWatch, cluster_at, watch_head


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A control store, as far as its port goes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def told() -> list[str]:
    return []


class TestHeadWatch:
    def test_says_nothing_while_it_answers(
        self, listener: socket.socket, told: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_head, "cluster_at", lambda _: pytest.fail("it was asked"))
        head = HeadWatch(address_of(listener), "ours", tell=told.append)
        assert head.answers()
        assert head.answers()
        assert told == []

    def test_waits_for_one_that_may_come_back(
        self, listener: socket.socket, told: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_head, "cluster_at", lambda _: "ours")
        address = address_of(listener)
        head = HeadWatch(address, "ours", tell=told.append)
        listener.close()
        assert not head.answers()
        assert not head.answers()
        with socket.create_server(("127.0.0.1", int(address.partition(":")[2]))):
            assert head.answers()
            assert head.answers()
        assert [line.partition(address)[2] for line in told if address in line] == [
            ") does not answer; waiting"
        ]
        assert told[1] == "the head of the cluster answers again"

    def test_another_cluster_at_its_address_does_not_know_the_run(
        self, listener: socket.socket, told: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_head, "cluster_at", lambda _: "another")
        address = address_of(listener)
        head = HeadWatch(address, "ours", tell=told.append)
        listener.close()
        assert not head.answers()
        with (
            socket.create_server(("127.0.0.1", int(address.partition(":")[2]))),
            pytest.raises(ClusterError, match=r"started anew.*same command resumes"),
        ):
            head.answers()

    def test_one_that_stays_away_ends_the_wait(
        self, listener: socket.socket, told: list[str]
    ) -> None:
        head = HeadWatch(address_of(listener), "ours", tell=told.append, patience_s=0.0)
        listener.close()
        assert not head.answers()
        with pytest.raises(ClusterError, match=r"has not answered for 0 s.*same command resumes"):
            head.answers()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_connected_cluster_answers_with_its_own_identifier(told: list[str]) -> None:
    head = watch_head(told.append)
    assert head.answers()
    assert cluster_at(ray.get_runtime_context().gcs_address) == head._cluster
    assert told == []
