"""Follow the trials of a sweep in the driver: record their state, print it."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from raysl.errors import RunFolderError
from raysl.report.terminal import console
from raysl.sweep.config import SweepConfig
from raysl.sweep.summary import best_of, ranked
from raysl.sweep.tracking import STATUS_IN_MLFLOW, SweepTracking
from raysl.sweep.trial import (
    ENDED,
    SweepFolder,
    Trial,
    read_candidate,
    read_trial,
    write_trial,
)
from raysl.track.run_folder import MetricsFile, RunFolder, read_error

_LINE_EVERY_S = 10.0
_ROWS = 20


class SweepWatch:
    """Records the state of every trial on disk and in MLflow, and shows it on the terminal.

    Args:
        sweep: The sweep.
        folder: The sweep's folder.
        tracking: Sends the sweep to MLflow; None if it is not tracked.
        trials: All trials so far.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        folder: SweepFolder,
        *,
        tracking: SweepTracking | None,
        trials: list[Trial],
    ) -> None:
        self._sweep = sweep
        self._folder = folder
        self._tracking = tracking
        self._trials = {trial.number: trial for trial in trials}
        self._running: set[int] = set()
        self._started_at: dict[int, float] = {}
        self.unread: dict[int, str] = {}
        """Trials whose end could not be read from a store, and why."""
        self._view = _View(sweep)
        ended = sum(trial.status in STATUS_IN_MLFLOW for trial in trials)
        self._progress = MetricsFile(RunFolder(folder.path).metrics, start_step=ended)

    def __enter__(self) -> "SweepWatch":
        self._view.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._view.close(list(self._trials.values()))
        self._progress.close()

    def started(self, number: int) -> None:
        """Record that a trial starts or resumes."""
        self._running.add(number)
        self._started_at[number] = time.time()
        trial = self._read(number)
        if self._tracking is not None:
            self._tracking.start(trial)
        self._show()

    def reported(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record that a trial was evaluated."""
        self._fetch(number)
        self._read(number)
        self._show()

    def paused(self, number: int) -> None:
        """Record that a trial was paused and released its resources."""
        self._running.discard(number)
        self._write_times(number)
        self._fetch(number)
        self._read(number)
        self._show()

    def ended(self, number: int, *, error: str | None) -> None:
        """Record that a trial finished, was stopped or failed; the trial's folder says which.

        Args:
            number: The trial's number.
            error: Tune's error if the trial's process died, else None.
        """
        self._running.discard(number)
        folder = self._folder.trial(number)
        self._write_times(number)
        if (problem := self._fetch(number)) is not None:
            self.unread[number] = problem  # its end is unknown, so it is none
            return
        if folder.read_results() is None:  # a trial with results has finished in any case
            candidate = read_candidate(folder)
            assert candidate is not None
            written = read_error(folder)
            error = error or (written and f"{written['error']}: {written['message']}")
            status: Literal["failed", "stopped"] = "failed" if error else "stopped"
            write_trial(folder, candidate, status=status, error=error)
        trial = self._read(number)
        if self._tracking is not None:
            self._tracking.end(trial)
        self._log_progress()
        self._show()
        with suppress(RunFolderError):  # the end of the sweep waits for the copy
            self._folder.publish()

    def _fetch(self, number: int) -> str | None:
        """Get what a trial has written; return why this failed, or None."""
        try:
            self._folder.fetch_trial(number)
        except RunFolderError as error:
            return str(error)
        return None

    def _write_times(self, number: int) -> None:
        """Append the start and end of the time for which a trial held resources."""
        now = time.time()
        times = {"started": self._started_at.pop(number, now), "ended": now}
        with open(times_file(self._folder.trial(number)), "a", encoding="utf-8") as file:
            file.write(json.dumps(times) + "\n")

    def _read(self, number: int) -> Trial:
        trial = read_trial(self._folder.trial(number), self._sweep.metric)
        assert trial is not None
        if number in self._running:
            trial = trial._replace(status="running")
        self._trials[number] = trial
        return trial

    def _log_progress(self) -> None:
        """Append a record to the sweep's metrics file after a trial has ended."""
        ended = [trial for trial in self._trials.values() if trial.status in STATUS_IN_MLFLOW]
        best = best_of(ended, self._sweep.metric)
        counts = {
            f"sweep/{status}": float(sum(trial.status == status for trial in ended))
            for status in STATUS_IN_MLFLOW
        }
        value = {} if best is None or best.metric is None else {"sweep/best_metric": best.metric}
        self._progress.log(counts | value, step=len(ended))

    def _show(self) -> None:
        self._view.show(list(self._trials.values()))


def times_file(folder: RunFolder) -> Path:
    """Return the file that records when a trial held resources of the cluster."""
    return folder.path / "times.jsonl"


def placed_seconds(trial: Trial) -> float:
    """Return the seconds for which a trial held resources of the cluster, over all starts."""
    path = times_file(RunFolder(trial.path))
    if not path.exists():
        return 0.0
    spans = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return float(sum(span["ended"] - span["started"] for span in spans))


class _View:
    """The table of trials: live on a terminal, else a line every ten seconds."""

    def __init__(self, sweep: SweepConfig) -> None:
        self._sweep = sweep
        self._console: Console = console(error=True)
        self._live: Live | None = None
        self._last_line = 0.0

    def open(self) -> None:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=2)
            self._live.start()

    def show(self, trials: list[Trial]) -> None:
        if self._live is not None:
            self._live.update(trials_table(self._sweep, trials, rows=_ROWS))
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._print_line(trials)

    def close(self, trials: list[Trial]) -> None:
        if self._live is not None:
            self._live.update(trials_table(self._sweep, trials, rows=_ROWS))
            self._live.stop()
        else:
            self._print_line(trials)

    def _print_line(self, trials: list[Trial]) -> None:
        self._last_line = time.monotonic()
        counts = {s: sum(t.status == s for t in trials) for s in ("running", *STATUS_IN_MLFLOW)}
        text = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        best = best_of(trials, self._sweep.metric)
        if best is not None:
            text += f"; best {best.metric:.4g} ({params_text(best.params)})"
        self._console.print(f"trials: {text}", markup=False)


def params_text(params: Mapping[str, Any]) -> str:
    """Return parameters as a short text: the last part of each key, and its value."""
    return ", ".join(
        f"{key.rsplit('.', 1)[-1]} {short_text(value)}" for key, value in params.items()
    )


def short_text(value: Any) -> str:
    """Return a value with at most three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trials_table(sweep: SweepConfig, trials: list[Trial], *, rows: int) -> Table:
    """Return a table of running trials, then ended ones in order of rank; the best one is bold.

    Args:
        sweep: The sweep.
        trials: All trials.
        rows: Maximum number of rows.
    """
    running = [trial for trial in trials if trial.status == "running"]
    ended = [trial for trial in ranked(trials, sweep.metric) if trial.status in ENDED]
    best = best_of(trials, sweep.metric)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    table = Table(title=f"{sweep.name}: {len(trials)} trials", title_justify="left")
    for title in ("trial", *(key.rsplit(".", 1)[-1] for key in keys), "epoch", "status"):
        table.add_column(title)
    table.add_column(sweep.metric.name, justify="right")
    for trial in (running + ended)[:rows]:
        table.add_row(
            f"{trial.number:04d}",
            *(escape(short_text(trial.params.get(key, ""))) for key in keys),
            f"{trial.epoch:.3g}",
            trial.status if trial.error is None else escape(f"failed: {trial.error[:60]}"),
            "" if trial.metric is None else f"{trial.metric:.4g}",
            style="bold" if trial is best else None,
        )
    return table
