"""What the driver hears of trials, and finds out about those that Tune says nothing of."""

from types import SimpleNamespace
from typing import Any

from raysl.sweep.ray_tune import _Callback


class FakeTrial(SimpleNamespace):
    """A trial as a callback sees it."""

    def __str__(self) -> str:
        return f"{self.number:04d}"

    def get_error(self) -> Exception | None:
        return RuntimeError("first line\nno process was ready") if self.status == "ERROR" else None


class Heard:
    """A watcher and the suggestions at once."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def started(self, number: int) -> None:
        self.lines.append(("started", number))

    def paused(self, number: int) -> None:
        self.lines.append(("paused", number))

    def reported(self, number: int, metrics: Any) -> None:
        self.lines.append(("reported", number))

    def ended(self, number: int, *, error: str | None = None) -> None:
        self.lines.append(("ended", number, error))

    def next(self) -> None:
        return None


def test_what_tune_gives_up_in_silence_is_lost_and_nothing_else() -> None:
    heard = Heard()
    callback = _Callback(heard, heard)
    trials = [
        FakeTrial(number=n, status=status)
        for n, status in enumerate(("TERMINATED", "ERROR", "ERROR", "PENDING", "RUNNING"))
    ]
    callback.on_trial_complete(0, trials, trials[0])
    callback.on_trial_error(0, trials, trials[1])
    callback.on_experiment_end(trials)
    assert callback.lost == {2: "Ray Tune gave it up: no process was ready"}
    assert ("ended", 1, "no process was ready") in heard.lines
    assert all(line[1] in (0, 1) for line in heard.lines)


def test_a_pause_is_told_once_each_time() -> None:
    heard = Heard()
    callback = _Callback(heard, heard)
    trial = FakeTrial(number=3, status="RUNNING")
    for _ in range(2):
        callback.on_trial_start(0, [trial], trial)
        trial.status = "PAUSED"
        callback.on_step_begin(1, [trial])
        callback.on_step_begin(2, [trial])
    assert heard.lines == [("started", 3), ("paused", 3)] * 2


def test_paused_trials_take_no_place() -> None:
    callback = _Callback(Heard(), Heard())
    statuses = ("PAUSED", "RUNNING", "PENDING", "TERMINATED", "ERROR")
    callback.on_step_begin(0, [FakeTrial(number=n, status=s) for n, s in enumerate(statuses)])
    assert callback.num_running == 2
