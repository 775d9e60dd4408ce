"""Evaluate in the background of training; results are logged under their step when ready.

A pending evaluation is a file of encoder weights in the run folder until its metrics are in the
metrics file, so a run that was killed finds its pending evaluations. Evaluations run one after the
other, so metrics arrive in the order of their steps.
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

EvaluationStarter = Callable[[Path, OnlineSets], "Future[Mapping[str, float]]"]
"""Starts the evaluation of the encoder in a file; the future gets its metrics or exception."""

MOST_WAITING = 4
"""Most pending evaluations besides the running one. If evaluations take longer than the steps
between them, the oldest pending one is skipped: the curve gets sparser, but training does not
wait, and its end waits for at most this many evaluations."""


class OnlineEvaluations:
    """The running and pending evaluations of a run, on rank 0.

    An evaluation that fails is recorded in ``failed_evaluations.jsonl``; training continues.

    Args:
        folder: The run folder.
        sets: The images to evaluate on.
        begin: Starts an evaluation.
        log: Called with the metrics of each step, in the order of the steps.
        start_step: Number of steps already done. Pending evaluations of an earlier process up to
            this step are run now; those of later steps are deleted, since those steps are repeated.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        sets: OnlineSets,
        begin: EvaluationStarter,
        log: Log,
        start_step: int,
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
            still_valid = [r for r in read_failures(folder) if r["step"] <= start_step]
            text = "".join(json.dumps(record) + "\n" for record in still_valid)
            write_text(folder.failed_evaluations, text)
        self.collect()

    def add(self, step: int, write: Callable[[Path], None]) -> None:
        """Queue the evaluation of a step; ``write`` saves its encoder to a path."""
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
            self._fail(
                self._waiting.popleft(), f"skipped: {MOST_WAITING} newer evaluations were pending"
            )

    def collect(self) -> None:
        """Log the finished evaluations and start the next one; never waits."""
        self._advance(waits=False)

    def finish(self) -> None:
        """Wait for all evaluations and log them."""
        self._advance(waits=True)
        if self._folder.to_evaluate.is_dir() and not any(self._folder.to_evaluate.iterdir()):
            self._folder.to_evaluate.rmdir()

    def _advance(self, *, waits: bool) -> None:
        while self._running is not None or self._waiting:
            if self._running is None:
                step = self._waiting.popleft()
                try:
                    self._running = step, self._begin(self._path(step), self._sets)
                except Exception as error:  # training continues after any error
                    self._fail(step, _error_text(error))
                    continue
            step, future = self._running
            if not waits and not future.done():
                return
            self._running = None
            try:
                metrics = future.result()
            except Exception as error:
                self._fail(step, _error_text(error))
                continue
            self._log(metrics, step)
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return waiting_path(self._folder.to_evaluate, step)

    def _fail(self, step: int, problem: str) -> None:
        record = {"step": step, "problem": problem, "time": time.time()}
        with suppress(OSError):  # a full disk is reported when a checkpoint fails
            self._path(step).unlink(missing_ok=True)
            with open(self._folder.failed_evaluations, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def is_evaluated(record: Mapping[str, Any]) -> bool:
    """Return whether a record of the metrics file holds an evaluation."""
    return any(name.startswith("eval/") for name in record)


def read_failures(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the failed and skipped evaluations of a run, with ``step`` and ``problem``."""
    return read_metrics(folder.failed_evaluations)


def _error_text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
