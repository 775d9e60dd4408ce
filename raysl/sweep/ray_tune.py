"""Run a sweep on Ray Tune: trials, scheduler, search and callbacks.

A trial with one train worker runs raysl's training loop in Tune's process, which the next trial
reuses with everything that is loaded; only larger trials start Ray Train. Tune decides which trials
continue. Configuration and progress of a trial are in its folder, so a restart needs nothing from
Tune.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher

from raysl.errors import RunFolderError
from raysl.run.ray_cluster import in_background
from raysl.sources.source import Source
from raysl.store.objects import Store
from raysl.sweep.config import Dimension, SweepConfig
from raysl.sweep.ray_schedulers import Asha, HyperBand, Pbt
from raysl.sweep.ray_shares import Shares
from raysl.sweep.ray_trial import NUMBER, trial_in_process
from raysl.sweep.space import trial_name
from raysl.sweep.trial import ENDED, SweepFolder, Trial

_TUNE = ".tune"  # folder of Tune's own state
_TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first evaluation
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # everything is in the trials' folders
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read
}
# Set in the trials' processes, since Tune 2.60 does not pass it on (ENV_VARS_TO_PROPAGATE of
# ray/tune/execution/class_cache.py). A stopped trial finishes its item and closes its stream before
# the next trial reuses its process; Tune gives up a trial whose process is not free in time.
_TRIAL_ENVIRONMENT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "600"}


class Watcher(Protocol):
    """Callbacks in the driver for the events of trials; must not raise."""

    def started(self, number: int) -> None:
        """Handle the start or resume of a trial."""

    def reported(self, number: int, metrics: Mapping[str, float]) -> None:
        """Handle an evaluation of a trial."""

    def paused(self, number: int) -> None:
        """Handle a trial that was paused and released its resources."""

    def ended(self, number: int, *, error: str | None) -> None:
        """Handle a trial that ended or was stopped; ``error`` is set if its process died."""


class Suggestions(Protocol):
    """Supplies the trials to run, one after the other."""

    def next(self) -> tuple[int, Mapping[str, Any]] | None:
        """Return a trial's number and its parameters that may change in flight; None at the end.

        The trial's folder contains its configuration.
        """

    def ended(self, number: int) -> None:
        """Handle the end of a trial."""


def sweep_on_ray(
    sweep: SweepConfig,
    suggestions: Suggestions,
    watcher: Watcher,
    *,
    shares: Shares,
    most_trials: int,
    earlier: Sequence[Trial],
    sources: Mapping[str, Source],
    folder: SweepFolder,
    seconds: float | None = None,
) -> dict[int, str]:
    """Run trials on the connected cluster until there are no more.

    Args:
        sweep: The sweep.
        suggestions: Supplies the trials.
        watcher: Callbacks for the events of trials.
        shares: Resources of a trial, and the number of concurrent trials.
        most_trials: Maximum number of trials that ``suggestions`` supplies.
        earlier: All trials of earlier starts, for the scheduler to compare with.
        sources: Training images by :func:`source_key`; others are opened by the trials.
        folder: The sweep's folder.
        seconds: Time limit in seconds, after which all trials end; None for no limit.

    Returns:
        The trials that Tune gave up without a callback, by number, and the reason for each. They
        have not ended.
    """
    _prepare(shares)
    scheduler = _scheduler(sweep)
    max_running = shares.at_a_time if shares.nested else None
    _add_earlier(scheduler, earlier, most_trials=most_trials, max_running=max_running)
    callback = _Callback(watcher, suggestions)
    if sweep.scheduler.name == "pbt":  # Tune's PBT accepts no searcher
        search, space = _all_points(suggestions)
    else:
        search, space = _Search(suggestions, callback, scheduler, max_running=shares.at_a_time), {}
    tuner = tune.Tuner(
        tune.with_resources(_trainable(sweep, folder, sources), _resources(shares)),
        param_space=space,
        tune_config=_tune_config(
            search, scheduler, seconds, nested=shares.nested, most_trials=most_trials
        ),
        run_config=tune.RunConfig(
            name="tune",
            **_storage(folder),
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=sweep.retries),
            verbose=0,
        ),
    )
    _delete_storage(folder)
    try:
        # In the main thread Ray would handle Ctrl-C itself.
        in_background(tuner.fit, name="raysl-tune").result()
    finally:
        with suppress(RunFolderError):  # the next start deletes it
            _delete_storage(folder)
    return callback.lost


def _storage(folder: SweepFolder) -> dict[str, Any]:
    """Return where Tune keeps its state, which every process of the sweep must see."""
    if folder.stored is None:
        return {"storage_path": str(folder.path / _TUNE)}
    store: Store = folder.stored.for_workers().store
    return {
        "storage_path": f"{store.root.rstrip('/')}/{_TUNE}",
        "storage_filesystem": store.filesystem,
    }


def _delete_storage(folder: SweepFolder) -> None:
    if folder.stored is None:
        shutil.rmtree(folder.path / _TUNE, ignore_errors=True)
    else:
        folder.stored.for_workers().store.delete_folder(_TUNE)


def _prepare(shares: Shares) -> None:
    """Set the environment variables that Tune reads in the driver, and silence its loggers."""
    for name in ("ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.update(_TUNE_ENVIRONMENT)
    # With a searcher, Tune starts one trial after the other, each for the seconds in which its
    # process loads torch, unless it is told otherwise.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(shares.at_a_time)


def _trainable(sweep: SweepConfig, folder: SweepFolder, sources: Mapping[str, Source]) -> Any:
    return tune.with_parameters(
        _run_in_process,
        run=trial_in_process,
        sweep=folder.path if folder.stored is None else folder.stored.for_workers(),
        sources=dict(sources),
        metrics=(sweep.metric.name, *sweep.metric.also),
        exchanges=sweep.scheduler.name in ("pbt", "hyperband"),
        space=dict(sweep.space),
    )


def _run_in_process(point: dict[str, Any], *, run: Callable[..., None], **more: Any) -> None:
    """Run a trial in a process that waits for it to end before it runs the next one."""
    os.environ.update(_TRIAL_ENVIRONMENT)
    run(point, **more)


def _resources(shares: Shares) -> dict[str, float]:
    """Return the resources that Tune reserves for a trial; nested train workers reserve theirs."""
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
        # Trials are identified by name, since population based training copies all settings,
        # including the number, from one trial to another.
        trial_name_creator=lambda trial: trial_name(trial.config[NUMBER]),
        time_budget_s=seconds,
        # A process that has loaded torch and the images runs the next trial at once; one with
        # nested train workers must end, or they would stay.
        reuse_actors=not nested,
    )


def _scheduler(sweep: SweepConfig) -> TrialScheduler:
    """Return the scheduler of a sweep."""
    config = sweep.scheduler
    if config.name == "asha":
        return Asha(config, sweep.metric)
    if config.name == "hyperband":
        return HyperBand(config, sweep.metric)
    if config.name == "pbt":
        mutations = {key: _domain(dimension) for key, dimension in sweep.space.items()}
        ranges = {key: each.bounds for key, each in sweep.space.items() if not each.is_listed}
        return Pbt(config, sweep.metric, mutations=mutations, bounds=ranges)
    return FIFOScheduler()


def _domain(dimension: Dimension) -> Any:
    """Return a dimension as a domain of Tune, for redraws of population based training."""
    if dimension.is_listed:
        return dimension.labels()
    low, high = dimension.bounds
    if dimension.kind in ("int", "log_int"):
        whole = tune.randint if dimension.kind == "int" else tune.lograndint
        return whole(int(low), int(high) + 1)  # Tune's upper end is not included
    return (tune.uniform if dimension.kind == "uniform" else tune.loguniform)(low, high)


def _add_earlier(
    scheduler: TrialScheduler,
    earlier: Sequence[Trial],
    *,
    most_trials: int,
    max_running: int | None,
) -> None:
    """Add the trials of earlier starts to a halving scheduler."""
    ended = [trial for trial in earlier if trial.status in ENDED]
    if isinstance(scheduler, Asha):
        scheduler.add_earlier(ended)
    elif isinstance(scheduler, HyperBand):
        scheduler.expect(len(ended) + most_trials, max_running=max_running)
        scheduler.add_earlier(earlier, ended=[trial.number for trial in ended])


def _all_points(suggestions: Suggestions) -> tuple[Any, dict[str, Any]]:
    """Return a searcher over all suggested trials, and the space that contains their points."""
    points = []
    while (suggestion := suggestions.next()) is not None:
        number, mutable = suggestion
        points.append({NUMBER: number, **mutable})
    space = {key: tune.choice([point[key] for point in points]) for key in points[0]}
    return BasicVariantGenerator(points_to_evaluate=points), space


class _Search(Searcher):
    """Passes suggested trials to Tune.

    Args:
        suggestions: Supplies the trials.
        callback: Counts the running trials.
        scheduler: Notified when there are no more trials.
        max_running: Number of concurrent trials; None leaves it to their resources, so that the
            next trial waits for a process to reuse.
    """

    def __init__(
        self,
        suggestions: Suggestions,
        callback: "_Callback",
        scheduler: TrialScheduler,
        *,
        max_running: int | None,
    ) -> None:
        super().__init__()
        self._suggestions = suggestions
        self._scheduler = scheduler
        self._callback = callback
        self._max_running = max_running

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its state, which is never read

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if self._max_running is not None and self._callback.num_running >= self._max_running:
            return None
        suggestion = self._suggestions.next()
        if suggestion is None:
            if isinstance(self._scheduler, HyperBand):  # it waits for trials that may be added
                self._scheduler.all_added()
            return Searcher.FINISHED
        number, mutable = suggestion
        return {NUMBER: number, **mutable}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing; the callback calls ``suggestions.ended``."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing; Tune's state is never read."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing; Tune's state is never read."""


class _Callback(tune.Callback):
    """Forwards Tune's events in the driver to the watcher and the suggestions."""

    def __init__(self, watcher: Watcher, suggestions: Suggestions) -> None:
        self.lost: dict[int, str] = {}
        self._watcher = watcher
        self._suggestions = suggestions
        self._trials: Sequence[Any] = ()
        self._placed: set[int] = set()
        self._ended: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as in _Search: the state is never read

    @property
    def num_running(self) -> int:
        """Number of trials that have, or wait for, a process; paused ones do not count."""
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
        """Find trials that Tune gave up without a callback, as when no process was free in time."""
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
    """Return the last non-empty line of an error, since Tune's text is a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
