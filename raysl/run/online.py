"""Evaluate in the background of training; results are logged under their step when ready.

An encoder that is to be evaluated is a file of weights in the run folder until its metrics are in
the metrics file. So a run that was killed finds what it still has to measure; and as one evaluation
follows the other, each metric arrives in the order of its steps.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysl.evaluate.online import OnlineSets
from raysl.folder.whole import write_text
from raysl.track.run_folder import RunFolder, list_waiting, read_metrics, waiting_path
from raysl.train.loop import Log

Begin = Callable[[Path, OnlineSets], "Future[Mapping[str, float]]"]
"""Begins to measure the encoder in a file, elsewhere; the future holds the metrics of the metrics
file, or what went wrong."""

MOST_WAITING = 4
"""Encoders that wait while another one is measured. Where evaluations take longer than the steps
between them, the oldest gives way to a newer one: the curve gets sparser, training does not wait,
and its end waits for no more than these."""


class OnlineEvaluations:
    """The evaluations of a run that are under way; for rank 0.

    An evaluation that fails is listed in ``failed_evaluations.jsonl`` and left out; training goes
    on.

    Args:
        folder: The run.
        sets: What to measure on.
        begin: Measures.
        log: Gets the metrics of a step, in the order of the steps.
        start_step: Steps done: what an earlier process left of up to there is measured now, what
            it left of later ones is thrown away, since those steps come again.
    """

    def __init__(
        self, folder: RunFolder, *, sets: OnlineSets, begin: Begin, log: Log, start_step: int
    ) -> None:
        self._folder = folder
        self._sets = sets
        self._begin = begin
        self._log = log
        self._running: tuple[int, Future[Mapping[str, float]]] | None = None
        done = {int(r["step"]) for r in read_metrics(folder.metrics) if is_evaluated(r)}
        self._waiting: deque[int] = deque()
        for step in list_waiting(folder.to_evaluate):
            if step > start_step or step in done:
                self._path(step).unlink(missing_ok=True)
            else:
                self._waiting.append(step)
        for half_written in folder.to_evaluate.glob(".*"):
            half_written.unlink()
        if folder.failed_evaluations.exists():
            known = [r for r in read_failures(folder) if r["step"] <= start_step]
            text = "".join(json.dumps(record) + "\n" for record in known)
            write_text(folder.failed_evaluations, text)
        self.collect()

    def add(self, step: int, write: Callable[[Path], None]) -> None:
        """Have the encoder of a step evaluated; ``write`` puts it into a file."""
        path = self._path(step)
        try:
            path.parent.mkdir(exist_ok=True)
            write(path)
        except OSError as error:
            self._fail(step, f"its encoder cannot be written: {error}")
            return
        self._waiting.append(step)
        self.collect()
        while len(self._waiting) > MOST_WAITING:
            self._fail(self._waiting.popleft(), f"left out: {MOST_WAITING} newer ones waited")

    def collect(self) -> None:
        """Log what is ready, and begin the next; never waits."""
        self._go_on(waits=False)

    def finish(self) -> None:
        """Wait for all evaluations, and log them."""
        self._go_on(waits=True)
        if self._folder.to_evaluate.is_dir() and not any(self._folder.to_evaluate.iterdir()):
            self._folder.to_evaluate.rmdir()

    def _go_on(self, *, waits: bool) -> None:
        while self._running is not None or self._waiting:
            if self._running is None:
                step = self._waiting.popleft()
                try:
                    self._running = step, self._begin(self._path(step), self._sets)
                except Exception as error:  # whatever it is, training goes on
                    self._fail(step, _told(error))
                    continue
            step, future = self._running
            if not waits and not future.done():
                return
            self._running = None
            try:
                metrics = future.result()
            except Exception as error:
                self._fail(step, _told(error))
                continue
            self._log(metrics, step)
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return waiting_path(self._folder.to_evaluate, step)

    def _fail(self, step: int, problem: str) -> None:
        record = {"step": step, "problem": problem, "time": time.time()}
        with suppress(OSError):  # a full disk stops the checkpoints, not this
            self._path(step).unlink(missing_ok=True)
            with open(self._folder.failed_evaluations, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def is_evaluated(record: Mapping[str, Any]) -> bool:
    """Whether a line of the metrics file holds an evaluation."""
    return any(name.startswith("eval/") for name in record)


def read_failures(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the evaluations of a run that failed or were left out: ``step`` and ``problem``."""
    return read_metrics(folder.failed_evaluations)


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
