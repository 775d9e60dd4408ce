"""Ctrl-C and SIGTERM: the first asks for a checkpoint, the second stops at once."""

import os
import signal
import threading

import pytest

from raysl.errors import StoppedError, Terminated
from raysl.run.stop import keeps_sigterm, sigterm_raises, stops_after_step

KINDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "kind"), KINDS)
class TestStopsAfterStep:
    def test_the_first_signal_asks_and_the_training_stops_when_it_can(
        self,
        number: signal.Signals,
        kind: type[BaseException],
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        asked: list[str] = []
        before = signal.getsignal(number)

        def train() -> None:
            with stops_after_step(lambda: asked.append("stop")):
                send(number)
                assert asked == ["stop"]
                raise StoppedError("after step 3 of 9")

        with pytest.raises(kind) as caught:
            train()
        assert type(caught.value) is kind
        assert str(caught.value) == "after step 3 of 9"
        assert "stopping after the current step, with a checkpoint" in capfd.readouterr().err
        assert signal.getsignal(number) is before

    def test_the_second_stops_at_once(
        self, number: signal.Signals, kind: type[BaseException]
    ) -> None:
        def train() -> None:
            with stops_after_step(lambda: None):
                send(number)
                send(number)
                pytest.fail("it went on")

        with pytest.raises(kind) as caught:
            train()
        assert type(caught.value) is kind

    def test_a_training_that_ends_in_time_has_ended(
        self, number: signal.Signals, kind: type[BaseException]
    ) -> None:
        with stops_after_step(lambda: None):
            send(number)
            result = "done"
        assert result == "done"

    def test_one_that_the_process_ignores_stays_ignored(
        self, number: signal.Signals, kind: type[BaseException]
    ) -> None:
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with stops_after_step(lambda: pytest.fail("asked")):
                send(number)
            assert signal.getsignal(number) is signal.SIG_IGN
        finally:
            signal.signal(number, before)


def test_another_thread_handles_no_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with stops_after_step(lambda: None), sigterm_raises():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_sigterm_raises_what_ends_a_command() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_raises():
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_library_that_takes_sigterm_gives_it_back() -> None:
    with sigterm_raises():
        ours = signal.getsignal(signal.SIGTERM)
        with keeps_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is ours
