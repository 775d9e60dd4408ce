"""Schedulers for Tune whose decisions do not depend on pauses and resumes of a trial.

Tune's asynchronous halving compares epochs as floats, so it may judge trials at an evaluation that
is not nearest to the rung. Tune's HyperBand fills brackets in the order in which resources become
free, and counts evaluations that a resumed trial reports again as new. The schedulers here identify
a trial by its number and an evaluation by its index, so they decide the same after a resume.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining

from raysl.sweep.config import AshaScheduler, HyperBandScheduler, MetricConfig, PbtScheduler
from raysl.sweep.ray_trial import NUMBER
from raysl.sweep.rungs import Evaluations, hyperband, to_fraction
from raysl.sweep.trial import Trial
from raysl.sweep.trial_run import AGAIN, LAST

_PERIOD = "period"


class _EvaluationsByTrial:
    """Numbers the evaluations of each trial; the first reported one gives their spacing."""

    def __init__(self) -> None:
        self._by_id: dict[str, Evaluations] = {}

    def get(self, trial: Any, epoch: float) -> Evaluations:
        return self._by_id.setdefault(trial.trial_id, Evaluations(epoch))


class _Rung(NamedTuple):
    """An epoch at which trials are compared."""

    epoch: Fraction
    values: dict[str, float]
    """Values of the trials that reached it, by trial id; larger is better."""


class _Bracket:
    """Rungs at geometrically growing epochs.

    Args:
        first: Epoch of the first rung.
        factor: Ratio of the epochs of two successive rungs.
    """

    def __init__(self, first: float, factor: float) -> None:
        self._rungs: list[_Rung] = [_Rung(to_fraction(first), {})]
        self._factor = to_fraction(factor)

    def reached(self, trial: str, number: int, evaluations: Evaluations) -> _Rung | None:
        """Return the last rung reached by a trial; None if it already has a value there."""
        while evaluations.nearest_to(self._rungs[-1].epoch) <= number:
            self._rungs.append(_Rung(self._rungs[-1].epoch * self._factor, {}))
        reached = [rung for rung in self._rungs if evaluations.nearest_to(rung.epoch) <= number]
        return reached[-1] if reached and trial not in reached[-1].values else None


class Asha(FIFOScheduler):
    """Asynchronous successive halving: stops a trial that is not among the best at a rung so far.

    Source: Li et al. 2018, arXiv:1810.05934v5, in the variant that stops trials, as in Ray Tune.

    Args:
        config: The scheduler's settings.
        metric: The metric that trials are compared by.
    """

    def __init__(self, config: AshaScheduler, metric: MetricConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Tune has few types
        self._metric = metric.name
        self._sign = 1.0 if metric.mode == "max" else -1.0
        self._percentile = 100.0 * (1.0 - 1.0 / config.reduction_factor)
        self._brackets = [_Bracket(config.grace_epochs, config.reduction_factor)]
        self._evaluations = _EvaluationsByTrial()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record a trial's value at the rung that it reached; stop it if most there are better."""
        if self._metric not in result:
            return self.CONTINUE
        evaluations = self._evaluations.get(trial, result["epoch"])
        number = evaluations.number_at(result["epoch"])
        rung = self._brackets[0].reached(trial.trial_id, number, evaluations)
        if rung is None:
            return self.CONTINUE
        earlier = list(rung.values.values())
        value = self._sign * float(result[self._metric])
        if not math.isfinite(value):  # nothing is worse
            return self.STOP
        rung.values[trial.trial_id] = value
        stops = earlier and value < np.percentile(earlier, self._percentile)
        return self.STOP if stops else self.CONTINUE

    def add_earlier(self, trials: Sequence[Trial]) -> None:
        """Add trials that ended in earlier starts, to compare new ones with them."""
        name = str(self._metric)
        for trial in trials:
            for epoch, value in trial.curve:
                self.on_trial_result(
                    None, _EarlierTrial(f"earlier-{trial.number}"), {"epoch": epoch, name: value}
                )


class _EarlierTrial(NamedTuple):
    """A trial of an earlier start, with the one attribute of Tune's trials that is used."""

    trial_id: str


class _Halving:
    """One bracket of HyperBand: its trials, their values, and the trials still in it.

    Args:
        rungs: Numbers of the evaluations at which trials are compared.
        members: Numbers of its trials.
        factor: One of this many trials continues at each rung.
    """

    def __init__(self, rungs: Sequence[int], members: Sequence[int], factor: Fraction) -> None:
        self._rungs = rungs
        self._factor = factor
        self._values: list[dict[int, float]] = [{} for _ in rungs]
        self._level = 0
        self.alive = set(members)

    def record(self, number: int, evaluation: int, value: float) -> None:
        """Record the value of an evaluation; repeated reports and unknown trials are ignored."""
        if number in self.alive:
            for rung, values in zip(self._rungs, self._values, strict=True):
                if evaluation >= rung:
                    values.setdefault(number, value if math.isfinite(value) else -math.inf)

    def compare(self, ended: set[int]) -> None:
        """Drop the worse trials at each rung that every trial has reached or ended before."""
        while self._level < len(self._rungs):
            values = self._values[self._level]
            if not self.alive <= values.keys() | ended:
                return
            num_survivors = max(1, math.floor(len(self.alive) / self._factor))
            ranked = sorted(
                self.alive & values.keys(), key=lambda number: (-values[number], number)
            )
            self.alive = {number for number in ranked[:num_survivors] if values[number] > -math.inf}
            self._level += 1

    def waits(self, number: int) -> bool:
        """Return whether a trial has reached the next rung and others have not."""
        return self._level < len(self._rungs) and number in self._values[self._level]


class HyperBand(FIFOScheduler):
    """Synchronous successive halving with several first rungs: a bracket waits for its last trial.

    A trial's number determines its bracket. An evaluation that is reported again after a resume is
    ignored.

    Source: Li et al. 2016, arXiv:1603.06560v4, Algorithm 1.

    Args:
        config: The scheduler's settings.
        metric: The metric that trials are compared by.
    """

    def __init__(self, config: HyperBandScheduler, metric: MetricConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Tune has few types
        self._metric = metric.name
        self._sign = 1.0 if metric.mode == "max" else -1.0
        self._plans = hyperband(config.max_evaluations, config.reduction_factor)
        self._factor = to_fraction(config.reduction_factor)
        self._evaluations = _EvaluationsByTrial()
        self._bracket_of: dict[int, _Halving] = {}
        self._added: set[int] = set()
        self._ended: set[int] = set()
        self._max_running: int | None = None

    def expect(self, num_trials: int, *, max_running: int | None) -> None:
        """Build the brackets.

        Args:
            num_trials: Number of trials of the sweep, including those of earlier starts.
            max_running: Maximum number of concurrent trials; None leaves it to their resources.
        """
        self._max_running = max_running
        first = 0
        while first < num_trials:
            for plan in self._plans:
                members = range(min(first, num_trials), min(first + plan.size, num_trials))
                bracket = _Halving(plan.evaluations, members, self._factor)
                self._bracket_of.update(dict.fromkeys(members, bracket))
                first += plan.size

    def add_earlier(self, trials: Sequence[Trial], *, ended: Sequence[int]) -> None:
        """Add the evaluations of trials of earlier starts, and the numbers of those that ended."""
        for trial in trials:
            evaluations = Evaluations(trial.curve[0][0]) if trial.curve else None
            for epoch, value in trial.curve:
                assert evaluations is not None
                self._record(trial.number, evaluations.number_at(epoch), value)
        self._added |= set(ended)
        self._ended |= set(ended)

    def all_added(self) -> None:
        """Stop waiting for trials that were not added: there will be no more."""
        self._ended |= self._bracket_of.keys() - self._added

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial; smaller numbers that were not added have no run and count as ended."""
        number = trial.config[NUMBER]
        self._added.add(number)
        self._ended.discard(number)
        self._ended |= {other for other in self._bracket_of if other < number} - self._added

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record an evaluation; stop a trial that is dropped, pause one that waits for others."""
        if self._metric not in result:
            return self.CONTINUE
        number = trial.config[NUMBER]
        evaluation = self._evaluations.get(trial, result["epoch"]).number_at(result["epoch"])
        self._record(number, evaluation, float(result[self._metric]))
        bracket = self._bracket_of[number]
        bracket.compare(self._ended)
        if number not in bracket.alive:
            return self.STOP
        return self.PAUSE if bracket.waits(number) and not result.get(LAST) else self.CONTINUE

    def _record(self, number: int, evaluation: int, value: float) -> None:
        self._bracket_of[number].record(number, evaluation, self._sign * value)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Stop waiting for a trial that ended; its recorded values still count."""
        self._ended.add(trial.config[NUMBER])

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Stop waiting for a trial that failed; Tune adds it again if it is retried."""
        self._ended.add(trial.config[NUMBER])

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Stop waiting for a trial that was removed."""
        self._ended.add(trial.config[NUMBER])

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Stop paused trials that were dropped; return a paused or new trial to run, or None."""
        trials = tune_controller.get_trials()
        for bracket in set(self._bracket_of.values()):
            bracket.compare(self._ended)
        waiting = [trial for trial in trials if trial.status == "PAUSED"]
        for trial in waiting:
            if trial.config[NUMBER] not in self._bracket_of[trial.config[NUMBER]].alive:
                tune_controller.stop_trial(trial)
        num_running = sum(trial.status == "RUNNING" for trial in trials)
        if self._max_running is not None and num_running >= self._max_running:
            return None
        ready = (trial for trial in waiting if self._may_continue(trial))
        new = (trial for trial in trials if trial.status == "PENDING")
        return next(ready, None) or next(new, None)

    def _may_continue(self, trial: Any) -> bool:
        number = trial.config[NUMBER]
        bracket = self._bracket_of[number]
        return trial.status == "PAUSED" and number in bracket.alive and not bracket.waits(number)


class Pbt(PopulationBasedTraining):
    """Population based training that exchanges at the evaluations nearest to its period.

    Source: Jaderberg et al. 2017, arXiv:1711.09846v2.

    Args:
        config: The scheduler's settings.
        metric: The metric that trials are compared by.
        mutations: Tune's domain of each setting that may change.
        bounds: Low and high of settings with a range; perturbed values are clipped to it.
    """

    def __init__(
        self,
        config: PbtScheduler,
        metric: MetricConfig,
        *,
        mutations: dict[str, Any],
        bounds: Mapping[str, tuple[float, float]],
    ) -> None:
        def clip(params: dict[str, Any]) -> dict[str, Any]:
            clipped = {k: min(max(params[k], low), high) for k, (low, high) in bounds.items()}
            return params | clipped

        super().__init__(
            metric=metric.name,
            mode=metric.mode,
            time_attr=_PERIOD,
            perturbation_interval=1,
            quantile_fraction=config.quantile,
            resample_probability=config.resample_prob,
            hyperparam_mutations=mutations,
            custom_explore_fn=clip,
            log_config=False,
        )
        self._every_epochs = config.perturb_every_epochs
        self._evaluations = _EvaluationsByTrial()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Exchange at the end of a period, except at repeated evaluations and the last one.

        After the last evaluation, an exchange would give a trial settings that train no step.
        """
        evaluations = self._evaluations.get(trial, result["epoch"])
        if result.get(AGAIN) or result.get(LAST):
            return self.CONTINUE
        periods = evaluations.num_periods_ended(result["epoch"], self._every_epochs)
        decision: str = super().on_trial_result(
            tune_controller, trial, {**result, _PERIOD: periods}
        )
        return decision
