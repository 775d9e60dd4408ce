"""One kind of fault of the kill table: its run, and the harm that is done to it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from faults.running import EVERY, FIRST, Running, Settings, settings
from faults.trial import Trial, waiting


def kill(pids: set[int]) -> None:
    """Kill processes; some may have ended."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


class Case:
    """A fault: one process killed, if nothing is overridden.

    Args:
        role: The process that is hit.
        number: The signal that it gets.
        num_train_workers: ``cluster.num_train_workers`` of the run.
    """

    starts_over = False
    """Whether the run has to start from its first step afterwards."""
    compares = True
    """Whether its numbers must be those of an undisturbed run."""
    alike = "small"
    """Cases of one name, number of train workers and length share their undisturbed run."""
    every = EVERY
    """Steps between two faults; more if a fault lasts while the run goes on."""

    def __init__(
        self,
        role: str = "",
        number: signal.Signals = signal.SIGKILL,
        *,
        num_train_workers: Any = 1,
    ) -> None:
        self.role, self.number, self.num_train_workers = role, number, num_train_workers

    def times(self, most: int) -> int:
        """Return how often the fault is done in a run."""
        return most

    def step(self, number: int) -> int:
        """Return the step at which fault ``number``, from 0, is done."""
        return self.length(number)

    def length(self, times: int) -> int:
        """Return the number of steps of the run."""
        return FIRST + self.every * times

    def settings(self, times: int) -> Settings:
        """Return the settings of the run."""
        return settings(steps=self.length(times), num_train_workers=self.num_train_workers)

    @property
    def most_workers(self) -> int:
        """Number of train workers of the undisturbed run."""
        return self.num_train_workers if isinstance(self.num_train_workers, int) else 1

    def alone(self, times: int) -> Settings:
        """Return the settings of the undisturbed run: one worker computes the same without Ray."""
        workers = self.most_workers
        return settings(steps=self.length(times), num_train_workers=0 if workers == 1 else workers)

    @contextmanager
    def prepared(self, trial: Trial, times: int) -> Iterator[Running]:
        """Provide the run, which is not started yet."""
        yield Running(trial, self.settings(times))

    def harm(self, run: Running) -> float:
        """Do the fault; return when, in seconds since 1970."""
        now = run.hit(self.role, self.number)
        if self.role == "driver":
            for _ in waiting(150):  # after a signal it ends its step first
                if run.status() is not None:
                    break
        return now

    def measured(self, run: Running, at: float) -> dict[str, Any]:
        """Return what else is told of a fault at a time."""
        return {}

    def at_end(self, run: Running) -> dict[str, Any]:
        """Return what else is told of a run."""
        return {}
