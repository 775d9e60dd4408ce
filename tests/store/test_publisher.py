"""Copies in a thread: training waits for the copy before, and learns of what lasts."""

import threading
from collections.abc import Callable

import pytest

from raysl.errors import RunFolderError
from raysl.store.publisher import Publisher


class Copies:
    """Counts copies; the ones in ``fails`` raise, and each waits for ``gate``."""

    def __init__(self, *fails: int, error: Callable[[], Exception] | None = None) -> None:
        self.count = 0
        self.fails = fails
        self.error = error or (lambda: RunFolderError("down"))
        self.gate = threading.Event()
        self.gate.set()
        self.patient: list[bool] = []

    def __call__(self, patient: bool) -> None:
        assert self.gate.wait(20)
        self.patient.append(patient)
        self.count += 1
        if self.count in self.fails:
            raise self.error()


def test_a_request_does_not_wait_for_its_own_copy_but_for_the_one_before() -> None:
    copies = Copies()
    copies.gate.clear()
    with Publisher(copies, every_s=60) as publisher:
        publisher.publish(waits=False)
        assert copies.count == 0
        second = threading.Thread(target=publisher.publish, kwargs={"waits": False})
        second.start()
        second.join(0.1)
        assert second.is_alive()
        copies.gate.set()
        second.join(20)
    assert copies.count == 2  # the end waits for what was requested


def test_a_copy_that_failed_once_is_made_up_for_by_the_next() -> None:
    copies = Copies(1)
    with Publisher(copies, every_s=60) as publisher:
        publisher.publish(waits=False)
        publisher.publish(waits=False)
    assert copies.count == 2


def test_a_store_that_stays_down_is_raised_at_the_next_request() -> None:
    copies = Copies(1, 2)
    with Publisher(copies, every_s=60) as publisher:
        publisher.publish(waits=False)
        with pytest.raises(RunFolderError, match="down"):
            publisher.publish(waits=False)
        publisher.publish(waits=True)
        publisher.publish(waits=True)
    assert copies.patient == [True, False, False, True]  # a minute was enough for the first


def test_patience_is_back_when_the_error_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysl.store.publisher.RETRY_S", 0.0)
    copies = Copies(1)
    with Publisher(copies, every_s=60) as publisher:
        publisher.publish(waits=False)
        publisher.publish(waits=False)
    assert copies.patient == [True, True]


def test_who_waits_learns_of_every_error() -> None:
    copies = Copies(1, 2, error=lambda: ValueError("other"))
    with Publisher(copies, every_s=60) as publisher:
        for _ in range(2):
            with pytest.raises(RunFolderError, match="ValueError: other"):
                publisher.publish(waits=True)


def test_copies_at_intervals_end_nothing() -> None:
    copies = Copies(1, 2)
    with Publisher(copies, every_s=0.01) as publisher:
        while copies.count < 3:
            pass
        publisher.publish(waits=True)
    assert not any(copies.patient[:3])  # a request need not wait for their patience
