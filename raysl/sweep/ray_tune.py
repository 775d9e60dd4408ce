"""Run a sweep on Ray Tune: trials, scheduler, search and callbacks.

A trial of one train worker runs raysl's loop in Tune's own process, which the next trial takes over
with all that is loaded; only larger ones start Ray Train inside. Tune decides who goes on; what a
trial is and how far it came lies in its folder, so Tune keeps nothing that a restart would need.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher

from raysl.run.background import in_background
from raysl.sources.source import Source
from raysl.sweep.config import Dimension, SweepConfig
from raysl.sweep.ray_schedulers import Asha, HyperBand, Pbt
from raysl.sweep.ray_shares import Shares
from raysl.sweep.ray_trial import NUMBER, trial_in_process
from raysl.sweep.space import trial_name
from raysl.sweep.trial import ENDED, SweepFolder, Trial

_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first evaluation
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials' folders hold it all
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nobody reads Tune's own state
}
# In the trials' processes, to which Tune 2.60 hands on none of its own (ENV_VARS_TO_PROPAGATE of
# ray/tune/execution/class_cache.py). A stopped trial finishes its item and closes its stream before
# the next one takes its process over: a trial whose process is not free in time is lost to Tune.
_TRIAL_ENVIRONMENT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "600"}


class Watcher(Protocol):
    """Is told what happens to trials, in the driver; must not raise."""

    def started(self, number: int) -> None:
        """A trial begins, or goes on."""

    def reported(self, number: int, metrics: Mapping[str, float]) -> None:
        """A trial was evaluated."""

    def paused(self, number: int) -> None:
        """A trial gave its place away, and may go on later."""

    def ended(self, number: int, *, error: str | None) -> None:
        """A trial ended, or was stopped; with an error if its process died for good."""


class Suggestions(Protocol):
    """Hands out trials, one after the other."""

    def next(self) -> tuple[int, Mapping[str, Any]] | None:
        """Return a trial's number and parameters that may change in flight; None at the end.

        Its folder holds its configuration by now.
        """

    def ended(self, number: int) -> None:
        """Hear that a trial ended."""


def sweep_on_ray(
    sweep: SweepConfig,
    suggestions: Suggestions,
    watcher: Watcher,
    *,
    shares: Shares,
    most_trials: int,
    known: Sequence[Trial],
    sources: Mapping[str, Source],
    folder: SweepFolder,
    seconds: float | None = None,
) -> dict[int, str]:
    """Run trials on the connected cluster until there are no more.

    Args:
        sweep: The sweep.
        suggestions: Which trials.
        watcher: Is told what happens.
        shares: What they take.
        most_trials: Trials that suggestions may give.
        known: All trials of earlier starts: the scheduler compares with them too.
        sources: Training images by :func:`source_key`; others are opened where they are needed.
        folder: The sweep's, on a disk that all nodes share; Tune's own files lie there meanwhile.
        seconds: After which no trial goes on; None for no limit.

    Returns:
        Trials that Tune gave up without a word to anyone, and why: they have not ended.
    """
    _prepare()
    scheduler = _scheduler(sweep)
    most = shares.at_a_time if shares.nested else None
    _tell_known(scheduler, known, most_trials=most_trials, most=most)
    callback = _Callback(watcher, suggestions)
    scratch = folder.path / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    if sweep.scheduler.name == "pbt":  # which refuses anyone who suggests
        search, space = _all_at_once(suggestions)
    else:
        search, space = _Search(suggestions, callback, scheduler, most=most), {}
    tuner = tune.Tuner(
        tune.with_resources(_trainable(sweep, folder, sources), _resources(shares)),
        param_space=space,
        tune_config=_tune_config(
            search, scheduler, seconds, nested=shares.nested, most_trials=most_trials
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=sweep.retries),
            verbose=0,
        ),
    )
    try:
        # In the main thread Ray would take Ctrl-C for itself.
        in_background(tuner.fit, name="raysl-tune").result()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return callback.lost


def _prepare() -> None:
    """Tell Tune what it reads from its own process, and to be quiet."""
    for name in ("ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update(_TUNE_ENVIRONMENT)


def _trainable(sweep: SweepConfig, folder: SweepFolder, sources: Mapping[str, Source]) -> Any:
    return tune.with_parameters(
        _patiently,
        run=trial_in_process,
        trials=folder.trials,
        shelf=dict(sources),
        metrics=(sweep.metric.name, *sweep.metric.also),
        exchanges=sweep.scheduler.name in ("pbt", "hyperband"),
        space=dict(sweep.space),
    )


def _patiently(given: dict[str, Any], *, run: Callable[..., None], **more: Any) -> None:
    """Run a trial in a process that waits for it to end before it takes the next one."""
    os.environ.update(_TRIAL_ENVIRONMENT)
    run(given, **more)


def _resources(shares: Shares) -> dict[str, float]:
    """What Tune sets aside for a trial; the workers below one set theirs aside themselves."""
    return {"CPU": 0.01} if shares.nested else {"CPU": shares.cpus, "GPU": shares.gpus}


def _tune_config(
    search: Any,
    scheduler: TrialScheduler,
    seconds: float | None,
    *,
    nested: bool,
    most_trials: int,
) -> tune.TuneConfig:
    return tune.TuneConfig(
        search_alg=search,
        scheduler=scheduler,
        num_samples=most_trials,
        # A trial is known by its name: population based training hands on settings whole, with the
        # number in them.
        trial_name_creator=lambda trial: trial_name(trial.config[NUMBER]),
        time_budget_s=seconds,
        # A process that has loaded torch and the images takes the next trial at once; one with
        # train workers below it has to go, or they would stay.
        reuse_actors=not nested,
    )


def _scheduler(sweep: SweepConfig) -> TrialScheduler:
    """Return the scheduler; time is counted in evaluations, at the same epochs for all trials."""
    chosen = sweep.scheduler
    if chosen.name == "asha":
        return Asha(chosen, sweep.metric)
    if chosen.name == "hyperband":
        return HyperBand(chosen, sweep.metric)
    if chosen.name == "pbt":
        mutations = {key: _domain(dimension) for key, dimension in sweep.space.items()}
        ranges = {key: each.bounds for key, each in sweep.space.items() if not each.is_listed}
        return Pbt(chosen, sweep.metric, mutations=mutations, bounds=ranges)
    return FIFOScheduler()


def _domain(dimension: Dimension) -> Any:
    """Return a dimension as Tune's, for what population based training draws anew."""
    if dimension.is_listed:
        return dimension.labels()
    low, high = dimension.bounds
    if dimension.kind in ("int", "log_int"):
        whole = tune.randint if dimension.kind == "int" else tune.lograndint
        return whole(int(low), int(high) + 1)  # Tune's upper end is not included
    return (tune.uniform if dimension.kind == "uniform" else tune.loguniform)(low, high)


def _tell_known(
    scheduler: TrialScheduler, known: Sequence[Trial], *, most_trials: int, most: int | None
) -> None:
    """Let halving compare new trials with those of earlier starts."""
    ended = [trial for trial in known if trial.status in ENDED]
    if isinstance(scheduler, Asha):
        scheduler.tell(ended)
    elif isinstance(scheduler, HyperBand):
        scheduler.expect(len(ended) + most_trials, most=most)
        scheduler.tell(known, ended=[trial.number for trial in ended])


def _all_at_once(suggestions: Suggestions) -> tuple[Any, dict[str, Any]]:
    """Return all trials as points that Tune's own generator goes through, and the space around."""
    points = []
    while (found := suggestions.next()) is not None:
        number, mutable = found
        points.append({NUMBER: number, **mutable})
    space = {key: tune.choice([point[key] for point in points]) for key in points[0]}
    return BasicVariantGenerator(points_to_evaluate=points), space


class _Search(Searcher):
    """Hands Tune the trials that someone else thinks of.

    Args:
        suggestions: Who thinks of them.
        callback: Knows how many run.
        scheduler: Is told when there are no more.
        most: Trials at a time; None leaves that to what they reserve, so that the next one waits
            for the process of the one that ends and takes it over.
    """

    def __init__(
        self,
        suggestions: Suggestions,
        callback: "_Callback",
        scheduler: TrialScheduler,
        *,
        most: int | None,
    ) -> None:
        super().__init__()
        self._suggestions = suggestions
        self._scheduler = scheduler
        self._callback = callback
        self._most = most

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its own state down; nobody reads it

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if self._most is not None and self._callback.num_running >= self._most:
            return None
        found = self._suggestions.next()
        if found is None:
            if isinstance(self._scheduler, HyperBand):  # which waits for those that may come
                self._scheduler.no_more()
            return Searcher.FINISHED
        number, mutable = found
        return {NUMBER: number, **mutable}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Suggestions are told by the callback, which knows more."""

    def save(self, checkpoint_path: str) -> None:
        """Nobody reads it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nobody writes it."""


class _Callback(tune.Callback):
    """Passes on what Tune says of trials, in the driver's process."""

    def __init__(self, watcher: Watcher, suggestions: Suggestions) -> None:
        self.lost: dict[int, str] = {}
        self._watcher = watcher
        self._suggestions = suggestions
        self._trials: Sequence[Any] = ()
        self._placed: set[int] = set()
        self._ended: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as of _Search

    @property
    def num_running(self) -> int:
        """Trials that have, or wait for, a process; those that a scheduler paused do not."""
        return sum(trial.status in ("PENDING", "RUNNING") for trial in self._trials)

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        self._trials = trials
        for number in [int(str(trial)) for trial in trials if trial.status == "PAUSED"]:
            if number in self._placed:
                self._placed.discard(number)
                self._watcher.paused(number)

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        number = int(str(trial))
        self._placed.add(number)
        self._watcher.started(number)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any
    ) -> None:
        self._watcher.reported(int(str(trial)), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial, error=None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial, error=_reason(trial.get_error()))

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        """Find trials that Tune gave up where it tells nobody, as when it has no process ready."""
        for trial in trials:
            number = int(str(trial))
            if trial.status == "ERROR" and number not in self._ended:
                self.lost[number] = f"Ray Tune gave it up: {_reason(trial.get_error())}"

    def _end(self, trial: Any, *, error: str | None) -> None:
        number = int(str(trial))
        self._placed.discard(number)
        self._ended.add(number)
        self._watcher.ended(number, error=error)
        self._suggestions.ended(number)


def _reason(error: BaseException | None) -> str:
    """Return the last line that says something; Tune puts the whole traceback into one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
