"""The lease of a folder in a store: one driver at a time, and none for ever."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.errors import RunFolderError
from raysl.store import lease as module
from raysl.store.lease import LEASE, MISSED, Lease, Owner, check_lease, read_owner
from raysl.store.objects import Store

RENEW_S = 0.05


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"memory://{tmp_path.name}/lease")


@pytest.fixture(autouse=True)
def _watches_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WATCH_EVERY_S", RENEW_S / 2)


def take(store: Store, told: list[str] | None = None) -> Lease:
    tell = (lambda _: None) if told is None else told.append
    return Lease(store, instead="give another name", tell=tell, renew_s=RENEW_S)


def owned(store: Store, **values: object) -> Owner:
    """Write the lease of a process of another machine."""
    owner = Owner("far-away", 42, "theirs", "another machine", 0.0, time.time())
    owner = owner._replace(**values)  # type: ignore[arg-type]
    store.put(LEASE, json.dumps(owner._asdict()).encode())
    return owner


def renewed(store: Store) -> float:
    owner = read_owner(store)
    assert owner is not None
    return owner.renewed


def until(happens: Callable[[], bool]) -> bool:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + 20
    while not happens() and time.monotonic() < deadline:
        time.sleep(RENEW_S / 2)
    return happens()


def test_a_lease_is_renewed_while_it_is_held_and_gone_afterwards(store: Store) -> None:
    with take(store) as held:
        first = read_owner(store)
        assert first is not None
        assert (first.pid, first.token) == (os.getpid(), held.token)
        assert until(lambda: renewed(store) > first.renewed)
        check_lease(store, held.token)
    assert read_owner(store) is None


def test_a_process_of_this_machine_that_holds_it_is_named_at_once(store: Store) -> None:
    told: list[str] = []
    with (
        take(store),
        pytest.raises(RunFolderError, match=rf"process {os.getpid()} of .*renewed 0 s ago"),
        take(store, told),
    ):
        pytest.fail("two hold the folder")
    assert told == []


def test_a_process_of_this_machine_that_has_ended_holds_nothing(store: Store) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owned(store, pid=ended.pid, machine=module._machine())
    told: list[str] = []
    with take(store, told) as held:
        check_lease(store, held.token)
    assert told == []


def test_another_machine_that_renews_it_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = owned(store)
    renewals = iter([first, first, first._replace(renewed=first.renewed + 1)])
    monkeypatch.setattr(module, "read_owner", lambda _: next(renewals))
    told: list[str] = []
    with (
        pytest.raises(RunFolderError, match=r"process 42 of far-away .*or give another name"),
        take(store, told),
    ):
        pytest.fail("two hold the folder")
    assert "process 42 of far-away" in told[0]


def test_another_machine_that_does_not_renew_it_loses_it(store: Store) -> None:
    owned(store)
    began = time.monotonic()
    with take(store) as held:
        check_lease(store, held.token)
    assert time.monotonic() - began >= MISSED * RENEW_S


def test_an_old_lease_is_not_waited_for(store: Store) -> None:
    owned(store, renewed=time.time() - 3600)
    told: list[str] = []
    with take(store, told) as held:
        check_lease(store, held.token)
    assert told == []


def test_who_lost_it_stops_writes_nothing_and_leaves_it_to_its_owner(store: Store) -> None:
    with take(store) as held:
        owned(store)
        assert until(lambda: not held._thread.is_alive())
        with pytest.raises(RunFolderError, match=r"process 42 of far-away .* has taken it over"):
            check_lease(store, held.token)
    owner = read_owner(store)
    assert owner is not None
    assert owner.token == "theirs"


def test_workers_stop_when_the_driver_has_gone(store: Store) -> None:
    with take(store) as held:
        token = held.token
    with pytest.raises(RunFolderError, match="its driver has ended"):
        check_lease(store, token)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "x"}', b'{"pid": "x"}'])
def test_a_damaged_lease_binds_nobody(store: Store, content: bytes) -> None:
    store.put(LEASE, content)
    with take(store) as held:
        check_lease(store, held.token)


def test_a_renewal_that_fails_is_repeated(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with take(store) as held:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_write", lambda *_: (_ for _ in ()).throw(OSError("down")))
            time.sleep(3 * RENEW_S)
        before = renewed(store)
        assert until(lambda: renewed(store) > before)
        check_lease(store, held.token)
