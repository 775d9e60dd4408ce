"""One start of a sweep: write the trials, run those that have not ended, compare them all."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysl.config.yaml_text import to_yaml
from raysl.errors import ConfigError, RayslError, SweepError
from raysl.folder.whole import write_json, write_text
from raysl.report.terminal import say
from raysl.run.environment import git_state
from raysl.run.places import read_run, with_absolute_files
from raysl.run.ray_cluster import connect, disconnect
from raysl.run.recipe import RunConfig
from raysl.run.source_record import record_source
from raysl.run.tracking import print_problem
from raysl.sweep.config import SweepConfig
from raysl.sweep.ray_shares import Shares, plan_shares
from raysl.sweep.ray_tune import sweep_on_ray
from raysl.sweep.results import (
    by_reason,
    failures_of,
    next_line,
    print_results,
    results_of,
    write_best,
)
from raysl.sweep.sources import Sources
from raysl.sweep.space import Candidate, run_config, samples
from raysl.sweep.summary import summarise
from raysl.sweep.tracking import SweepTracking
from raysl.sweep.trial import (
    ENDED,
    SweepFolder,
    Trial,
    newest_change,
    read_candidate,
    read_trial,
    read_trials,
    write_trial,
)
from raysl.sweep.watch import SweepWatch, short_text
from raysl.track.results import SweepResults
from raysl.track.uri import tracking_uri, without_password

if TYPE_CHECKING:  # Optuna is an extra
    from raysl.sweep.tpe import ParzenSearch


class _PendingTrials:
    """Supplies trials whose folders exist; ``in_flight``: parameters may change during a trial."""

    def __init__(self, folder: SweepFolder, numbers: Sequence[int], *, in_flight: bool) -> None:
        self._folder = folder
        self._numbers = deque(numbers)
        self._in_flight = in_flight

    def next(self) -> tuple[int, Mapping[str, Any]] | None:
        """Return the next trial, with the current parameters if they may change in flight."""
        if not self._numbers:
            return None
        number = self._numbers.popleft()
        folder = self._folder.trial(number)
        candidate = read_candidate(folder)
        assert candidate is not None
        if not self._in_flight:
            return number, {}
        change = newest_change(folder)
        return number, candidate.params if change is None else change.params

    def ended(self, number: int) -> None:
        """Do nothing: all trials were drawn in advance."""


class _OptunaTrials:
    """Supplies the interrupted trials in the order of their numbers, then Optuna's candidates."""

    def __init__(self, start: "SweepStart", numbers: Sequence[int]) -> None:
        self._start = start
        self._pending = _PendingTrials(start.folder, numbers, in_flight=False)
        self._search = start.optuna_search()

    def next(self) -> tuple[int, Mapping[str, Any]] | None:
        """Return the next candidate that has a valid run; others are recorded as failed."""
        start = self._start
        trial = self._pending.next()
        while trial is None and self._search.num_asked < (start.sweep.budget.trials or 0):
            candidate = self._search.ask()
            try:
                start.write(candidate, start.checked_run(candidate))
                start.folder.publish(waits=True)  # for the process that trains it
            except RayslError as error:
                start.write_failed(candidate, error)
                self._search.tell(candidate.number, (), status="failed")
                continue
            trial = candidate.number, {}
        return trial

    def ended(self, number: int) -> None:
        """Report the results of a trial to Optuna."""
        trial = read_trial(self._start.folder.trial(number), self._start.sweep.metric)
        if trial is not None and trial.status in ENDED:
            self._search.tell(number, trial.curve, status=trial.status)


class SweepStart:
    """One start of a sweep.

    Args:
        sweep: The sweep.
        folder: The sweep's folder, locked by this process.
        home: Base of relative paths.
        sources: The training images of the sweep's runs.
    """

    def __init__(
        self, sweep: SweepConfig, folder: SweepFolder, *, home: Path, sources: Sources
    ) -> None:
        self.sweep = sweep
        self.folder = folder
        self._home = home
        self._sources = sources
        self._uri = tracking_uri(sweep.track.tracking_uri, folder=home)
        self._tracking: SweepTracking | None = None
        self._lost: dict[int, str] = {}
        self._problems: list[str] = []

    def run(self, candidates: Sequence[tuple[Candidate, RunConfig[Any]]]) -> SweepResults:
        """Run all trials that have not ended; return the results of the sweep."""
        for candidate, config in candidates:
            self.write(candidate, config)
        trials = self._trials()
        pending = [trial.number for trial in trials if trial.status not in ENDED]
        if pending or self._has_suggestions():
            self._run(trials, pending)
        else:
            say(f"{self.folder.shown()}: this sweep is finished; name=... starts another")
        return self._conclude()

    def raise_problems(self) -> None:
        """Raise if the sweep failed, after results and report are written.

        Raises:
            SweepError: If trials were lost or failed except by diverging, or none has the metric.
        """
        if self._problems:
            raise SweepError(f"{self.folder.shown()}: " + "\n  ".join(self._problems))

    def optuna_search(self) -> "ParzenSearch":
        """Return Optuna's search with the results of every ended trial.

        Raises:
            ConfigError: If Optuna is not installed.
        """
        try:
            from raysl.sweep.tpe import ParzenSearch  # noqa: PLC0415 - few sweeps need Optuna
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"search.name=optuna needs a package that is not installed ({error.name}): "
                f"pip install raysl[optuna], or use search.name=random"
            ) from None
        search = ParzenSearch(self.sweep, self.folder.optuna)
        for trial in self._trials():
            if trial.status in ENDED:
                search.tell(trial.number, trial.curve, status=trial.status)
        return search

    def checked_run(self, candidate: Candidate) -> RunConfig[Any]:
        """Return a candidate's run after checking that it can start.

        Raises:
            RayslError: If it cannot.
        """
        config = run_config(self.sweep, candidate, folder=self.folder.shown())
        self._sources.check(config)
        return with_absolute_files(config, self._home)

    def write(self, candidate: Candidate, config: RunConfig[Any]) -> None:
        """Create a trial's folder if it does not exist."""
        trial = self.folder.trial(candidate.number)
        if read_candidate(trial) is None:
            trial.path.mkdir(parents=True, exist_ok=True)
            write_text(trial.config, to_yaml(config.model_dump(mode="json")))
            record_source(trial, self._sources.of(config), config)
            write_trial(trial, candidate)

    def write_failed(self, candidate: Candidate, error: RayslError) -> None:
        """Record that a candidate has no valid run."""
        trial = self.folder.trial(candidate.number)
        trial.path.mkdir(parents=True, exist_ok=True)
        write_trial(trial, candidate, status="failed", error=f"{type(error).__name__}: {error}")

    def _trials(self) -> list[Trial]:
        return read_trials(self.folder, self.sweep.metric)

    def _has_suggestions(self) -> bool:
        """Return whether Optuna may suggest further candidates."""
        if self.sweep.search.name != "optuna":
            return False
        return len(self._trials()) < (self.sweep.budget.trials or 0)

    def _run(self, trials: list[Trial], pending: list[int]) -> None:
        folders = {trial.number: self.folder.trial(trial.number) for trial in trials}
        ended = [folders[number] for number in folders if number not in pending]
        resumed = (folders[number] for number in pending)
        self._sources.check_unchanged(resumed, ended, self.sweep.set)
        hours = self.sweep.budget.hours
        until = math.inf if hours is None else time.monotonic() + hours * 3600
        with ExitStack() as stack:
            if connect():
                stack.callback(disconnect)
            shares = plan_shares(
                self.sweep, self._example_runs(pending), most_trials=self._num_left(pending)
            )
            self._say_start(trials, pending, shares)
            self._tracking = self._start_tracking()
            watch = stack.enter_context(
                SweepWatch(self.sweep, self.folder, tracking=self._tracking, trials=trials)
            )
            try:
                self._run_trials(watch, shares, until=until)
            except BaseException:
                if self._tracking is not None:
                    self._tracking.finish(status="KILLED", artifacts=[], tags={})
                raise

    def _run_trials(self, watch: SweepWatch, shares: Shares, *, until: float) -> None:
        """Run the trials that have not ended; retry those that Tune lost, ``retries`` times."""
        for _ in range(1 + self.sweep.retries):
            trials = self._trials()
            pending = [trial.number for trial in trials if trial.status not in ENDED]
            in_flight = self.sweep.scheduler.name == "pbt"
            self.folder.publish(waits=True)
            lost = sweep_on_ray(
                self.sweep,
                _OptunaTrials(self, pending)
                if self.sweep.search.name == "optuna"
                else _PendingTrials(self.folder, pending, in_flight=in_flight),
                watch,
                shares=shares,
                most_trials=self._num_left(pending),
                earlier=trials,
                sources=self._sources.opened,
                folder=self.folder,
                seconds=None if until == math.inf else max(1.0, until - time.monotonic()),
            )
            self._lost = {**lost, **watch.unread}
            watch.unread.clear()
            self.folder.fetch()
            if not self._lost or time.monotonic() >= until:
                return
            say(f"retrying the trials that Ray lost: {by_reason(self._lost)}")

    def _num_left(self, pending: Sequence[int]) -> int:
        """Return the number of trials left, including those that Optuna may still suggest."""
        num_ended = len(self._trials()) - len(pending)
        return max(len(pending), (self.sweep.budget.trials or 0) - num_ended)

    def _example_runs(self, pending: Sequence[int]) -> list[RunConfig[Any]]:
        """Return the unfinished runs, or a random one before Optuna's first suggestion."""
        runs = [read_run(self.folder.trial(number)) for number in pending]
        drawn = samples(self.sweep)[:1] if not runs else []
        return runs or [run_config(self.sweep, each, folder=self.folder.shown()) for each in drawn]

    def _start_tracking(self) -> SweepTracking | None:
        track = self.sweep.track
        if not track.mlflow:
            return None
        tracking = SweepTracking(
            self.sweep,
            self.folder,
            uri=self._uri,
            tags=git_state(),
        )
        print_problem(tracking.trouble, self._uri, ended=False)
        return tracking

    def _say_start(self, trials: Sequence[Trial], pending: Sequence[int], shares: Shares) -> None:
        sweep = self.sweep
        ended = len(trials) - len(pending)
        num_trials = sweep.budget.trials if sweep.search.name == "optuna" else len(trials)
        progress = f"{ended} of {num_trials} trials have ended" if ended else f"{num_trials} trials"
        search, scheduler = sweep.search.name, sweep.scheduler.name
        say(
            f"{sweep.name}{' resumes' if ended else ''}: {progress}, {search} search, "
            f"scheduler {scheduler}\n"
            f"  {shares.why}\n  {self.folder.shown()}"
        )

    def _conclude(self) -> SweepResults:
        """Compare the trials; write the summary, the report and the best trial's configuration."""
        sweep, folder = self.sweep, self.folder
        trials = self._trials()
        pending = sum(trial.status not in ENDED for trial in trials)
        if pending and not self._lost:
            say(f"budget.hours is up; {pending} trials are left: the same command resumes them")
        self._problems = failures_of(sweep, trials, self._lost)
        summary = summarise(trials, sweep.metric)
        write_best(sweep, folder, summary)
        results = results_of(sweep, folder, trials, summary)
        write_json(folder.summary, results)
        say("drawing the report")
        from raysl.sweep.page import draw_sweep  # noqa: PLC0415 - matplotlib takes a second

        for picture, problem in draw_sweep(
            folder, sweep, trials, summary, next_line=next_line(sweep, folder, summary)
        ):
            say(f"  {picture} could not be drawn: {problem}")
        self._end_tracking(results)
        write_json(folder.summary, results)
        print_results(sweep, folder, trials, summary)
        return results

    def _end_tracking(self, results: SweepResults) -> None:
        """Send what is missing to MLflow, and add its run id and problem to the results."""
        folder = self.folder
        if not self.sweep.track.mlflow:
            return
        tracking = self._tracking or self._start_tracking()
        assert tracking is not None
        say(f"sending what is missing to MLflow ({without_password(tracking.uri)})")
        tracking.catch_up(self._trials())
        tags = {
            "trials": str(results["trials"]),
            "finished": str(results["finished"]),
            "failed": str(results["failed"]),
            "stopped_early": str(results["stopped_early"]),
            "best_trial": str(results["best_trial"]),
            **{f"best.{key}": short_text(v) for key, v in (results["best_params"] or {}).items()},
        }
        artifacts = [folder.config, folder.summary, folder.best, folder.report]
        artifacts += sorted(folder.pictures.glob("*.png"))
        tracking.finish(status="FINISHED", artifacts=artifacts, tags=tags)
        print_problem(tracking.trouble, tracking.uri, ended=True)
        results["parent_run_id"] = tracking.parent_run_id
        results["mlflow_problem"] = tracking.problem
