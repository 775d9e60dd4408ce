"""Summarise a sweep: the best trial, the ranking, and the importance of each parameter."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import RandomForestRegressor

from raysl.sweep.config import SEED, MetricConfig
from raysl.sweep.trial import Status, Trial

_FEWEST_TRIALS = 4  # fewest to compute importances from
_NUM_TREES = 200
_NUM_SHUFFLES = 3
_SAME_EPOCH = 1.05  # batch sizes divide an epoch differently, so evaluations may be a step apart
_FAR_OUT = 3.0  # interquartile ranges; see visible_range
_RANK_ORDER = ("finished", "running", "stopped", "waiting", "failed")


class SeedMean(NamedTuple):
    """The mean of a candidate over its seeds."""

    params: dict[str, Any]
    """Parameters without the seed."""
    mean: float
    std: float | None
    """Sample standard deviation (over n - 1); None for one seed."""
    trials: tuple[Trial, ...]
    """The finished trials, best first."""


class Summary(NamedTuple):
    """The results of a sweep, whether it has ended or not."""

    best: Trial | None
    """The best trial of the candidate with the best mean over seeds. If no trial has finished, the
    one that came furthest; None if nothing was measured."""
    ranking: list[Trial]
    """Finished trials by their metric, then running and stopped ones by progress and metric, then
    waiting ones, then failed ones."""
    importance: dict[str, float]
    """Each parameter's share of the variance that the parameters explain, in [0, 1], largest first;
    sums to 1. Empty if fewer than four trials are comparable or the parameters explain nothing."""
    compared_at_epoch: float | None
    """Epoch at which trials are compared for importance if some were stopped; None for the end."""
    counts: dict[Status, int]
    """Number of trials by status."""


def summarise(trials: Sequence[Trial], metric: MetricConfig) -> Summary:
    """Summarise a sweep's trials.

    A failed trial is never the best, whatever it reached before.

    Args:
        trials: All trials, in any order.
        metric: The metric to compare by.
    """
    ranking = ranked(trials, metric)
    importance, epoch = _importance(ranking, metric)
    return Summary(
        best=best_of(trials, metric),
        ranking=ranking,
        importance=importance,
        compared_at_epoch=epoch,
        counts=dict(Counter(trial.status for trial in trials)),
    )


def ranked(trials: Sequence[Trial], metric: MetricConfig) -> list[Trial]:
    """Return the trials in the order of :attr:`Summary.ranking`."""
    return sorted(trials, key=lambda trial: _rank(trial, metric))


def means_over_seeds(trials: Sequence[Trial], metric: MetricConfig) -> list[SeedMean]:
    """Return the mean of each candidate over its finished seeds, best mean first.

    Trials without a parameter ``seed`` are candidates with one seed each.
    """
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in ranked(trials, metric):
        if trial.status == "finished" and trial.metric is not None:
            groups.setdefault(_without_seed(trial), []).append(trial)
    means = [_mean_of(group) for group in groups.values()]
    return sorted(means, key=lambda group: _signed(group.mean, metric))


def _without_seed(trial: Trial) -> tuple[Any, ...]:
    return tuple((key, value) for key, value in sorted(trial.params.items()) if key != SEED)


def _mean_of(group: Sequence[Trial]) -> SeedMean:
    values = np.array([trial.metric for trial in group], dtype=np.float64)
    params = {key: value for key, value in group[0].params.items() if key != SEED}
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return SeedMean(params, float(values.mean()), std, tuple(group))


def visible_range(values: Sequence[float], metric: MetricConfig) -> tuple[float, float]:
    """Return the range of values to draw; outliers on the bad side may be outside.

    Source: Tukey 1977, "Exploratory data analysis", sec. 2D: "far out" is more than three times the
    interquartile range beyond the quartiles.
    """
    lower, upper = np.percentile(values, [25, 75])
    low, high = min(values), max(values)
    margin = _FAR_OUT * (upper - lower)
    if metric.mode == "max":
        low = min(value for value in values if value >= lower - margin)
    else:
        high = max(value for value in values if value <= upper + margin)
    return float(low), float(high)


def _signed(value: float | None, metric: MetricConfig) -> float:
    """Return a number that is smaller for better values; unknown ones come last."""
    if value is None:
        return math.inf
    return -value if metric.mode == "max" else value


def _rank(trial: Trial, metric: MetricConfig) -> tuple[float, ...]:
    place = 1 if trial.status == "stopped" else _RANK_ORDER.index(trial.status)
    progress = 0.0 if trial.status == "finished" else -trial.epoch
    return place, progress, _signed(trial.metric, metric), trial.number


def best_of(trials: Sequence[Trial], metric: MetricConfig) -> Trial | None:
    """Return :attr:`Summary.best`; only candidates with the most finished seeds qualify.

    Otherwise a lucky single seed would beat means over three.
    """
    ranking = ranked(trials, metric)
    means = means_over_seeds(ranking, metric)
    most = max((len(group.trials) for group in means), default=0)
    for group in means:
        if len(group.trials) == most:
            return group.trials[0]
    measured = (t for t in ranking if t.metric is not None and t.status in ("running", "stopped"))
    return next(measured, None)


def _importance(
    trials: Sequence[Trial], metric: MetricConfig
) -> tuple[dict[str, float], float | None]:
    """Return the share of each parameter, and the epoch at which trials were compared.

    If trials were stopped, the finished ones were selected by their metric, and would hide what
    matters most. All are then compared at the last epoch that each of them reached. Outliers on the
    bad side count as the worst of the others, so that one collapsed trial does not dominate.
    """
    compared = [t for t in trials if t.status in ("finished", "stopped") and t.curve]
    epoch = None
    if any(trial.status == "stopped" for trial in compared):
        epoch = min(trial.curve[-1][0] for trial in compared)
    values = [_value_at(trial, epoch) for trial in compared]
    if len(compared) < _FEWEST_TRIALS:
        return {}, epoch
    low, high = visible_range(values, metric)
    return _shares(compared, np.clip(values, low, high)), epoch


def _value_at(trial: Trial, epoch: float | None) -> float:
    """Return a trial's last value up to an epoch, or its first value if all are later."""
    reached = [value for at, value in trial.curve if epoch is None or at <= epoch * _SAME_EPOCH]
    return reached[-1] if reached else trial.curve[0][1]


def _shares(trials: Sequence[Trial], values: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return each parameter's share of the variance that a random forest explains.

    A parameter's importance is the increase of the forest's error on unseen trials if its values
    are shuffled among them.

    Source: Breiman 2001, "Random forests", sec. 10.
    """
    columns = {key: _column(trials, key) for key in varied_parameters(trials)}
    if not columns or np.ptp(values) == 0:
        return {}
    inputs = np.concatenate(list(columns.values()), axis=1)
    forest = RandomForestRegressor(_NUM_TREES, max_features=1.0, random_state=0, n_jobs=1)
    forest.fit(inputs, values)
    ends = np.cumsum([column.shape[1] for column in columns.values()])
    places = np.split(np.arange(inputs.shape[1]), ends[:-1])
    increases = np.array([_error_increase(forest, inputs, values, place) for place in places])
    increases = np.maximum(increases, 0.0)
    if not increases.sum():
        return {}
    shares = dict(zip(columns, (increases / increases.sum()).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _column(trials: Sequence[Trial], key: str) -> npt.NDArray[np.float64]:
    """Return a parameter as ``(trials, columns)``: one column of numbers, or one for each label.

    Trials that lack it get a typical value, so that the lack itself carries no information: the
    parameter it depends on does.
    """
    present = [trial.params[key] for trial in trials if key in trial.params]
    if all(map(is_number, present)):
        usual = statistics.median_low(present)
        return np.array([[float(trial.params.get(key, usual))] for trial in trials])
    usual = statistics.mode(present)
    labels = list(dict.fromkeys(present))
    return np.array(
        [[float(t.params.get(key, usual) == label) for label in labels] for t in trials]
    )


def varied_parameters(trials: Sequence[Trial]) -> list[str]:
    """Return the parameters that differ between trials, in the order of the space."""
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    return [key for key in keys if len({trial.params.get(key) for trial in trials}) > 1]


def is_number(value: object) -> bool:
    """Return whether a parameter's value is a number; booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _error_increase(
    forest: RandomForestRegressor,
    inputs: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    columns: npt.NDArray[np.int64],
) -> float:
    """Return the mean increase of the squared error on unseen rows if columns are shuffled."""
    rng = np.random.default_rng(0)
    increases = []
    for tree, drawn_rows in zip(forest.estimators_, forest.estimators_samples_, strict=True):
        unseen = np.setdiff1d(np.arange(len(values)), drawn_rows)
        if len(unseen) < 2:
            continue
        error = np.square(tree.predict(inputs[unseen]) - values[unseen]).mean()
        for _ in range(_NUM_SHUFFLES):
            shuffled = inputs[unseen]
            shuffled[:, columns] = shuffled[rng.permutation(len(unseen))][:, columns]
            increases.append(np.square(tree.predict(shuffled) - values[unseen]).mean() - error)
    return float(np.mean(increases)) if increases else 0.0
