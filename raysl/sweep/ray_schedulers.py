"""Adapt Tune's schedulers to raysl: decide at rungs, whatever pauses a trial went through.

Tune's own asynchronous halving compares epochs as floats, so that trials are judged wherever an
evaluation lies behind a rung; its HyperBand fills brackets in the order in which places become
free, and takes evaluations that a resumed trial reports again for new ones. These know a trial by
its number and an evaluation by its place, and so decide the same after a resume.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining

from raysl.sweep.config import AshaScheduler, HyperBandScheduler, MetricConfig, PbtScheduler
from raysl.sweep.ray_trial import NUMBER
from raysl.sweep.rungs import Evaluations, exact, hyperband
from raysl.sweep.trial import Trial
from raysl.sweep.trial_run import AGAIN, LAST

_PERIOD = "period"


class _Clocks:
    """Numbers the evaluations of each trial, whose first one is the first that is reported."""

    def __init__(self) -> None:
        self._of: dict[str, Evaluations] = {}

    def of(self, trial: Any, epoch: float) -> Evaluations:
        return self._of.setdefault(trial.trial_id, Evaluations(epoch))


class _Rung(NamedTuple):
    """Where trials are compared."""

    at: Fraction
    """Epochs."""
    noted: dict[str, float]
    """Trial to its value there, the larger the better."""


class _Bracket:
    """Rungs of which each is the one before times a factor."""

    def __init__(self, first: float, factor: float) -> None:
        self._rungs: list[_Rung] = [_Rung(exact(first), {})]
        self._factor = exact(factor)

    def reached(self, trial: str, number: int, clock: Evaluations) -> _Rung | None:
        """Return the last rung that a trial has reached, if it is not noted there yet."""
        while clock.nearest_to(self._rungs[-1].at) <= number:
            self._rungs.append(_Rung(self._rungs[-1].at * self._factor, {}))
        reached = [rung for rung in self._rungs if clock.nearest_to(rung.at) <= number]
        return reached[-1] if reached and trial not in reached[-1].noted else None


class Asha(FIFOScheduler):
    """Asynchronous successive halving: who is not among the best at a rung so far is stopped.

    Source: Li et al. 2018, arXiv:1810.05934v5; by stopping, as Ray Tune's.

    Args:
        chosen: Its settings.
        metric: What decides.
    """

    def __init__(self, chosen: AshaScheduler, metric: MetricConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Tune has few types
        self._metric = metric.name
        self._sign = 1.0 if metric.mode == "max" else -1.0
        self._share = 100.0 * (1.0 - 1.0 / chosen.reduction_factor)
        self._brackets = [_Bracket(chosen.grace_epochs, chosen.reduction_factor)]
        self._clocks = _Clocks()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Note a trial at the rung that it reached; stop it if it is worse than most there."""
        if self._metric not in result:
            return self.CONTINUE
        clock = self._clocks.of(trial, result["epoch"])
        number = clock.number(result["epoch"])
        rung = self._brackets[0].reached(trial.trial_id, number, clock)
        if rung is None:
            return self.CONTINUE
        before = list(rung.noted.values())
        value = self._sign * float(result[self._metric])
        if not math.isfinite(value):  # nothing is worse
            return self.STOP
        rung.noted[trial.trial_id] = value
        stops = before and value < np.percentile(before, self._share)
        return self.STOP if stops else self.CONTINUE

    def tell(self, known: Sequence[Trial]) -> None:
        """Hear of trials that ended in earlier starts: new ones are compared with them."""
        name = str(self._metric)
        for trial in known:
            for epoch, value in trial.curve:
                self.on_trial_result(
                    None, _Known(f"known-{trial.number}"), {"epoch": epoch, name: value}
                )


class _Known(NamedTuple):
    """All that a scheduler looks at of a trial."""

    trial_id: str


class _Halving:
    """One bracket of HyperBand: who is in it, how far it is, and who is still in.

    Args:
        rungs: Evaluations at which it compares.
        members: Numbers of its trials.
        factor: Of so many at a rung one goes on.
    """

    def __init__(self, rungs: Sequence[int], members: Sequence[int], factor: Fraction) -> None:
        self._rungs = rungs
        self._factor = factor
        self._noted: list[dict[int, float]] = [{} for _ in rungs]
        self._level = 0
        self.alive = set(members)

    def note(self, number: int, evaluation: int, value: float) -> None:
        """Hear of an evaluation; one that was heard of before, or is none, changes nothing."""
        if number in self.alive:
            for rung, noted in zip(self._rungs, self._noted, strict=True):
                if evaluation >= rung:
                    noted.setdefault(number, value if math.isfinite(value) else -math.inf)

    def settle(self, gone: set[int]) -> None:
        """Compare at each rung that all have reached who have not gone; the worse ones are out."""
        while self._level < len(self._rungs):
            noted = self._noted[self._level]
            if not self.alive <= noted.keys() | gone:
                return
            kept = max(1, math.floor(len(self.alive) / self._factor))
            ranked = sorted(self.alive & noted.keys(), key=lambda number: (-noted[number], number))
            self.alive = {number for number in ranked[:kept] if noted[number] > -math.inf}
            self._level += 1

    def waits(self, number: int) -> bool:
        """Whether a trial that is in has reached the rung that others have not."""
        return self._level < len(self._rungs) and number in self._noted[self._level]


class HyperBand(FIFOScheduler):
    """Synchronous successive halving with several first rungs: a bracket waits for its last trial.

    A trial's bracket follows from its number, and a trial that was evaluated in an earlier start is
    not judged again.

    Source: Li et al. 2016, arXiv:1603.06560v4, Algorithm 1.

    Args:
        chosen: Its settings.
        metric: What decides.
    """

    def __init__(self, chosen: HyperBandScheduler, metric: MetricConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # Tune has few types
        self._metric = metric.name
        self._sign = 1.0 if metric.mode == "max" else -1.0
        self._plans = hyperband(chosen.max_evaluations, chosen.reduction_factor)
        self._factor = exact(chosen.reduction_factor)
        self._clocks = _Clocks()
        self._bracket_of: dict[int, _Halving] = {}
        self._seen: set[int] = set()
        self._gone: set[int] = set()
        self._most: int | None = None

    def expect(self, num_trials: int, *, most: int | None) -> None:
        """Hear how many trials there are, and how many may run at a time; None leaves that open."""
        self._most = most
        first = 0
        while first < num_trials:
            for plan in self._plans:
                members = range(min(first, num_trials), min(first + plan.size, num_trials))
                bracket = _Halving(plan.rungs, members, self._factor)
                self._bracket_of.update(dict.fromkeys(members, bracket))
                first += plan.size

    def tell(self, known: Sequence[Trial], *, ended: Sequence[int]) -> None:
        """Hear what trials were measured in earlier starts, and which of them have ended."""
        for trial in known:
            clock = Evaluations(trial.curve[0][0]) if trial.curve else None
            for epoch, value in trial.curve:
                assert clock is not None
                self._note(trial.number, clock.number(epoch), value)
        self._seen |= set(ended)
        self._gone |= set(ended)

    def no_more(self) -> None:
        """Hear that all trials that there will be were added."""
        self._gone |= self._bracket_of.keys() - self._seen

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take in a trial; a smaller number that did not come makes no run."""
        number = trial.config[NUMBER]
        self._seen.add(number)
        self._gone.discard(number)
        self._gone |= {other for other in self._bracket_of if other < number} - self._seen

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Note a trial; stop it if it is out, pause it if it has to wait for others."""
        if self._metric not in result:
            return self.CONTINUE
        number = trial.config[NUMBER]
        evaluation = self._clocks.of(trial, result["epoch"]).number(result["epoch"])
        self._note(number, evaluation, float(result[self._metric]))
        bracket = self._bracket_of[number]
        bracket.settle(self._gone)
        if number not in bracket.alive:
            return self.STOP
        return self.PAUSE if bracket.waits(number) and not result.get(LAST) else self.CONTINUE

    def _note(self, number: int, evaluation: int, value: float) -> None:
        self._bracket_of[number].note(number, evaluation, self._sign * value)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial that ended is not waited for; what was noted of it counts."""
        self._gone.add(trial.config[NUMBER])

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """As for one that ended; if it is tried again, it is added again."""
        self._gone.add(trial.config[NUMBER])

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """As for one that ended."""
        self._gone.add(trial.config[NUMBER])

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Stop those that lost while they waited; return one that won, or else a new one."""
        trials = tune_controller.get_trials()
        for bracket in set(self._bracket_of.values()):
            bracket.settle(self._gone)
        waiting = [trial for trial in trials if trial.status == "PAUSED"]
        for trial in waiting:
            if trial.config[NUMBER] not in self._bracket_of[trial.config[NUMBER]].alive:
                tune_controller.stop_trial(trial)
        num_running = sum(trial.status == "RUNNING" for trial in trials)
        if self._most is not None and num_running >= self._most:
            return None
        ready = (trial for trial in waiting if self._may_go_on(trial))
        new = (trial for trial in trials if trial.status == "PENDING")
        return next(ready, None) or next(new, None)

    def _may_go_on(self, trial: Any) -> bool:
        number = trial.config[NUMBER]
        bracket = self._bracket_of[number]
        return trial.status == "PAUSED" and number in bracket.alive and not bracket.waits(number)


class Pbt(PopulationBasedTraining):
    """Population based training that exchanges at the evaluations nearest to its period.

    Source: Jaderberg et al. 2017, arXiv:1711.09846v2.

    Args:
        chosen: Its settings.
        metric: What decides.
        mutations: What is drawn anew, by the setting's name.
        bounds: Low and high of those that are numbers of a range: what is changed stays in it.
    """

    def __init__(
        self,
        chosen: PbtScheduler,
        metric: MetricConfig,
        *,
        mutations: dict[str, Any],
        bounds: Mapping[str, tuple[float, float]],
    ) -> None:
        def inside(config: dict[str, Any]) -> dict[str, Any]:
            kept = {k: min(max(config[k], low), high) for k, (low, high) in bounds.items()}
            return config | kept

        super().__init__(
            metric=metric.name,
            mode=metric.mode,
            time_attr=_PERIOD,
            perturbation_interval=1,
            quantile_fraction=chosen.quantile,
            resample_probability=chosen.resample_prob,
            hyperparam_mutations=mutations,
            custom_explore_fn=inside,
            log_config=False,
        )
        self._every_epochs = chosen.perturb_every_epochs
        self._clocks = _Clocks()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Exchange if a period is over, but neither by what a restart repeats nor at the end.

        After the last evaluation an exchange would give a trial settings that train nothing.
        """
        clock = self._clocks.of(trial, result["epoch"])
        if result.get(AGAIN) or result.get(LAST):
            return self.CONTINUE
        periods = clock.periods(result["epoch"], self._every_epochs)
        told: str = super().on_trial_result(tune_controller, trial, {**result, _PERIOD: periods})
        return told
