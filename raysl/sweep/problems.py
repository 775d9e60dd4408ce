"""Find the problems of a sweep itself, before any candidate is drawn."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from raysl.config.load import MISSING, get_key, read_mapping
from raysl.errors import ConfigError
from raysl.evaluate.online import LABEL_FREE
from raysl.sweep.choices import Choices
from raysl.sweep.config import CONFIG, SweepConfig
from raysl.track.results import PROBES, TRAINING

# Settings of a run that the sweep controls, and what to use instead.
_OF_THE_SWEEP = {
    "name": "a trial is named after its number; set name",
    "output_dir": "set output_dir",
    "seed": "set repeats, which trains each candidate with several seeds,",
    "track": "set track",
    "evaluate.final": "set final",
    "evaluate.online": "trials wait for each value, by which schedulers decide; leave it out",
}
_LENGTHS = ("train.epochs", "train.steps")
# Folders of trials are named 0000 to 9999.
MOST_CANDIDATES = 10_000

# Settings that may change during a trial: read from the configuration at each step, not stored in
# checkpoints, and without influence on shapes.
_MUTABLE = (
    *(f"optim.{key}" for key in ("base_lr", "final_lr_ratio", "max_grad_norm")),
    *(f"optim.{key}" for key in ("weight_decay", "final_weight_decay")),
    *(f"adversary_optim.{key}" for key in ("base_lr", "weight_decay")),
    *(f"method.{key}" for key in ("temperature", "student_temperature", "teacher_temperature")),
    *(f"method.{key}" for key in ("ema_momentum", "bank_momentum", "center_momentum")),
    *(f"method.{key}" for key in ("redundancy", "similarity", "variance", "covariance")),
    *(f"method.{key}" for key in ("margin", "epsilon", "mask_ratio", "proximal_weight")),
)

_DEVIATING = ("linear", "few_shot", *TRAINING)  # over their seeds
FINAL_METRICS = {
    f"final/{prefix}{protocol}_top1{suffix}": protocol
    for prefix, protocols in (("", (*PROBES, *TRAINING)), ("untrained_", PROBES))
    for protocol in protocols
    for suffix in ("", *["_std"] * (protocol in _DEVIATING))
}
"""Metrics of a run's end, and the protocol that measures each."""
_ALWAYS = (
    "eval/knn_top1",
    *(f"eval/{name}" for name in LABEL_FREE),
    *(f"train/{key}" for key in ("loss", "grad_norm", "feature_std", "effective_rank")),
    *("train/images_per_s", "data/wait_share", "time/train_s", "time/evaluate_s"),
)
MEASURED_SECTIONS = ("eval", "train", "data", "time", "final")
"""Prefixes of metrics that every method has; others start with the method's name."""
OF_CLASSIFIERS = ("eval/top1", "final/top1")
"""Metrics of methods that train a classifier, instead of nearest neighbours and probes."""
METRICS = (*_ALWAYS, "train/adversary_loss", *FINAL_METRICS, *OF_CLASSIFIERS)
"""Metrics of every run whatever its method; there are more with labels."""


def space_problems(sweep: SweepConfig, *, known: Iterable[str] = ()) -> list[str]:
    """List the problems of a sweep itself: its base files, space, conditions, budget, search.

    Args:
        sweep: The sweep.
        known: Names that conditions may use although the space lacks them: dimensions already
            reported as invalid.
    """
    choices = Choices(sweep)
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: _base_problems(sweep),
        lambda: _key_problems(sweep),
        lambda: _twice_problems(sweep),
        lambda: _condition_problems(choices, sweep, set(known)),
        lambda: _exclude_problems(choices, sweep, set(known)),
        lambda: _search_problems(choices, sweep),
        lambda: _scheduler_problems(sweep),
        lambda: _metric_problems(sweep),
    ]
    return [problem for check in checks for problem in check()]


def problems_error(problems: Sequence[str], *, where: str) -> ConfigError:
    """Build the error that lists problems, a line each."""
    heading = f"{where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return ConfigError("\n".join([heading, *(f"  {problem}" for problem in problems)]))


def _base_problems(sweep: SweepConfig) -> Iterator[str]:
    for path in sweep.base:
        same = [other for other in sweep.base if Path(other).stem == Path(path).stem]
        if len(same) > 1 and same[0] == path:
            yield f"base: {' and '.join(same)} have the same name {Path(path).stem!r}; rename one"
    for base in sweep.bases.values():
        try:
            read_mapping(base)
        except ConfigError as error:
            yield f"base: {error}"


def _key_problems(sweep: SweepConfig) -> Iterator[str]:
    """Reject settings that the sweep controls, and unknown ones."""
    for section, keys in (("set", sweep.set), ("space", sweep.space)):
        for key in keys:
            own = next((k for k in _OF_THE_SWEEP if key == k or key.startswith(k + ".")), None)
            if own is not None:
                yield f"{section}.{key}: is the sweep's own setting; {_OF_THE_SWEEP[own]} instead"
            elif not all(key.split(".")):
                yield f"{section}.{key}: is not of the form section.key"
            elif key == CONFIG:
                yield f"{section}.{key}: is what tells several base files apart; list them in base"


def _twice_problems(sweep: SweepConfig) -> Iterator[str]:
    """Reject settings that are given twice."""
    for key in sweep.space:
        if key in sweep.set:
            yield f"set.{key}: the space varies it; drop one of the two"
    budget = sweep.budget
    if budget.epochs is not None and budget.steps is not None:
        yield f"budget: give epochs={budget.epochs:g} or steps={budget.steps}, not both"
    for key in _LENGTHS:
        if (budget.epochs is not None or budget.steps is not None) and (
            key in sweep.set or key in sweep.space
        ):
            given = "epochs" if budget.epochs is not None else "steps"
            yield f"{key}: budget.{given} already says how long a trial is; drop one of the two"


def _condition_problems(choices: Choices, sweep: SweepConfig, known: set[str]) -> Iterator[str]:
    if choices.in_circles:
        yield f"space: the conditions of {', '.join(choices.in_circles)} ask about each other"
        return
    for name in sweep.space:
        problems = [
            problem
            for key, wanted in sweep.space[name].when.items()
            for problem in _one_condition(choices, sweep, key, wanted, known=known)
        ]
        yield from (f"space.{name}.when: {problem}" for problem in problems)
        asks_known = any(key in known for key in sweep.space[name].when)
        if not problems and not asks_known and choices.demands(name) is None:
            yield f"space.{name}.when: is never met; the dimension would never be tried"


def _exclude_problems(choices: Choices, sweep: SweepConfig, known: set[str]) -> Iterator[str]:
    for place, conditions in enumerate(sweep.exclude):
        if not conditions:
            yield f"exclude.{place}: names no setting, and would leave out everything"
        for key, wanted in conditions.items():
            problems = _one_condition(choices, sweep, key, wanted, known=known)
            yield from (f"exclude.{place}: {problem}" for problem in problems)
    if sweep.exclude and sweep.search.name == "optuna":
        yield "exclude: search optuna would suggest what is left out; use when, or another search"
    elif sweep.exclude and choices.is_finite and next(choices.combinations(), None) is None:
        yield "exclude: leaves nothing to try"


def _one_condition(
    choices: Choices, sweep: SweepConfig, key: str, wanted: Any, *, known: set[str]
) -> Iterator[str]:
    """Reject a condition on something missing, or on a value that it cannot have."""
    if key in known or key == CONFIG:
        return
    dimension = choices.dimensions.get(key)
    if dimension is not None and not dimension.is_listed:
        yield f"{key} is drawn from a range; a condition can ask about listed values only"
    elif dimension is not None:
        possible = [*dimension.labels(), *dimension.values()]
        for value in wanted if isinstance(wanted, list) else [wanted]:
            if value not in possible:
                labels = [str(label) for label in dimension.labels()]
                yield f"{key} is never {value!r}; its values: {', '.join(labels)}"
    elif not any(key.startswith(name + ".") for name in choices.dimensions):
        settings = [choices.settings({CONFIG: label}) for label in sweep.bases]
        if all(get_key(values, key) is MISSING for values in settings):
            there = {*choices.dimensions, *(k for values in settings for k in _dotted(values))}
            yield f"no setting {key!r}{_near(key, there)}"


def _search_problems(choices: Choices, sweep: SweepConfig) -> Iterator[str]:
    trials, search = sweep.budget.trials, sweep.search.name
    ranges = [name for name, each in choices.dimensions.items() if not each.is_listed]
    if search == "grid":
        for name in ranges:
            yield (
                f"space.{name}: a grid search takes listed values; got a range "
                f"({choices.dimensions[name].kind}). List some, or set search.name=random"
            )
    elif trials is None and (ranges or search == "optuna"):
        yield f"budget.trials: missing; search {search} needs it to know when to end"
    if search == "grid" and not ranges and not choices.in_circles:
        count = len(list(islice(choices.combinations(), MOST_CANDIDATES + 1)))
        if trials is not None and trials < count:
            yield (
                f"budget.trials={trials} is less than the {count} combinations of the grid; leave "
                f"it out, or set search.name=random, which spreads over them evenly"
            )
    else:
        count = trials or 0
    if count * sweep.repeats > MOST_CANDIDATES:
        yield (
            f"{'more than ' if count > MOST_CANDIDATES else ''}{count * sweep.repeats:,} trials; a "
            f"sweep has at most {MOST_CANDIDATES:,}"
        )


def _scheduler_problems(sweep: SweepConfig) -> Iterator[str]:
    scheduler = sweep.scheduler
    if scheduler.name == "pbt":
        yield from _pbt_problems(sweep)
    if scheduler.name == "hyperband" and scheduler.reduction_factor > scheduler.max_evaluations:
        yield (
            f"scheduler: hyperband with max_evaluations={scheduler.max_evaluations} and "
            f"reduction_factor={scheduler.reduction_factor:g} compares nobody; raise the first to "
            f"the second or more"
        )


def _pbt_problems(sweep: SweepConfig) -> Iterator[str]:
    fixed = [key for key in sweep.space if key not in _MUTABLE]
    if fixed:
        yield (
            f"space: {', '.join(fixed)} cannot change while a trial is under way, as pbt "
            f"does; what can: {', '.join(_MUTABLE)}"
        )
    for key, dimension in sweep.space.items():
        if dimension.when:
            yield f"space.{key}.when: pbt changes every setting of every trial; drop the condition"
    if sweep.exclude:
        yield "exclude: pbt changes settings on the way; drop it"
    if sweep.search.name == "optuna":
        yield "search.name=optuna: pbt draws settings itself; set search.name=random"
    if sweep.repeats > 1:
        yield f"repeats={sweep.repeats}: trials of pbt go on from each other; set it to 1"
    if len(sweep.bases) > 1:
        yield "base: trials of pbt go on from each other; give one base"
    if sweep.budget.trials == 1:
        yield "budget.trials=1: trials of pbt go on from each other; use 2 or more"


def _metric_problems(sweep: SweepConfig) -> Iterator[str]:
    for place, name in (
        ("metric.name", sweep.metric.name),
        *(("metric.also", name) for name in sweep.metric.also),
    ):
        section = name.partition("/")[0]
        if name not in METRICS and section in MEASURED_SECTIONS:
            yield f"{place}: no metric {name!r}{_near(name, METRICS)}"
        elif name not in METRICS and "/" not in name:
            yield f"{place}: got {name!r}; a metric is section/name, such as {METRICS[0]}"
    name = sweep.metric.name
    if name.startswith("final/") and sweep.scheduler.name != "none":
        yield (
            f"metric.name={name} is measured at the end only; scheduler {sweep.scheduler.name} "
            f"needs one that is measured on the way, such as eval/knn_top1"
        )


def _near(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of plain values."""
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
