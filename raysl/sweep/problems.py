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
_SWEEP_SETTINGS = {
    "name": "a trial is named after its number; set name",
    "output_dir": "set output_dir",
    "seed": "set repeats, which trains each candidate with several seeds,",
    "track": "set track",
    "evaluate.final": "set final",
    "evaluate.online": "trials wait for the evaluations that schedulers need; leave it out",
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

# Protocols whose results include a standard deviation over seeds.
_WITH_STD = ("linear", "few_shot", *TRAINING)
FINAL_METRICS = {
    f"final/{prefix}{protocol}_top1{suffix}": protocol
    for prefix, protocols in (("", (*PROBES, *TRAINING)), ("untrained_", PROBES))
    for protocol in protocols
    for suffix in ("", *["_std"] * (protocol in _WITH_STD))
}
"""Metrics measured at the end of a run, and the protocol that measures each."""
_ALWAYS = (
    "eval/knn_top1",
    *(f"eval/{name}" for name in LABEL_FREE),
    *(f"train/{key}" for key in ("loss", "grad_norm", "feature_std", "effective_rank")),
    *("train/images_per_s", "data/wait_share", "time/train_s", "time/evaluate_s"),
)
MEASURED_SECTIONS = ("eval", "train", "data", "time", "final")
"""Prefixes of metrics that do not depend on the method; others start with its name."""
OF_CLASSIFIERS = ("eval/top1", "final/top1")
"""Metrics of methods that train a classifier, instead of nearest neighbours and probes."""
METRICS = (*_ALWAYS, "train/adversary_loss", *FINAL_METRICS, *OF_CLASSIFIERS)
"""All metrics whose prefix is in :data:`MEASURED_SECTIONS`."""


def space_problems(sweep: SweepConfig, *, invalid: Iterable[str] = ()) -> list[str]:
    """List the problems of a sweep itself: its base files, space, conditions, budget, search.

    Args:
        sweep: The sweep.
        invalid: Dimensions that the space lacks because they are invalid, which is reported
            elsewhere; conditions may name them.
    """
    choices = Choices(sweep)
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: _base_problems(sweep),
        lambda: _key_problems(sweep),
        lambda: _duplicate_problems(sweep),
        lambda: _condition_problems(choices, sweep, set(invalid)),
        lambda: _exclude_problems(choices, sweep, set(invalid)),
        lambda: _search_problems(choices, sweep),
        lambda: _scheduler_problems(sweep),
        lambda: _metric_problems(sweep),
    ]
    return [problem for check in checks for problem in check()]


def problems_error(problems: Sequence[str], *, where: str) -> ConfigError:
    """Build the error that lists problems, one line each."""
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
            owner = next((k for k in _SWEEP_SETTINGS if key == k or key.startswith(k + ".")), None)
            if owner is not None:
                remedy = _SWEEP_SETTINGS[owner]
                yield f"{section}.{key}: is the sweep's own setting; {remedy} instead"
            elif not all(key.split(".")):
                yield f"{section}.{key}: is not of the form section.key"
            elif key == CONFIG:
                yield f"{section}.{key}: tells several base files apart; list them in base"


def _duplicate_problems(sweep: SweepConfig) -> Iterator[str]:
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


def _condition_problems(choices: Choices, sweep: SweepConfig, invalid: set[str]) -> Iterator[str]:
    if choices.in_cycles:
        yield f"space: the conditions of {', '.join(choices.in_cycles)} depend on each other"
        return
    for name in sweep.space:
        problems = [
            problem
            for key, wanted in sweep.space[name].when.items()
            for problem in _one_condition(choices, sweep, key, wanted, invalid=invalid)
        ]
        yield from (f"space.{name}.when: {problem}" for problem in problems)
        names_invalid = any(key in invalid for key in sweep.space[name].when)
        if not problems and not names_invalid and choices.demands(name) is None:
            yield f"space.{name}.when: is never met; the dimension would never be tried"


def _exclude_problems(choices: Choices, sweep: SweepConfig, invalid: set[str]) -> Iterator[str]:
    for place, conditions in enumerate(sweep.exclude):
        if not conditions:
            yield f"exclude.{place}: names no setting, and would exclude everything"
        for key, wanted in conditions.items():
            problems = _one_condition(choices, sweep, key, wanted, invalid=invalid)
            yield from (f"exclude.{place}: {problem}" for problem in problems)
    if sweep.exclude and sweep.search.name == "optuna":
        yield "exclude: optuna would suggest excluded combinations; use when, or another search"
    elif sweep.exclude and choices.is_finite and next(choices.combinations(), None) is None:
        yield "exclude: leaves nothing to try"


def _one_condition(
    choices: Choices, sweep: SweepConfig, key: str, wanted: Any, *, invalid: set[str]
) -> Iterator[str]:
    """Reject a condition on a setting that does not exist, or on a value it cannot have."""
    if key in invalid or key == CONFIG:
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
            existing = {*choices.dimensions, *(k for values in settings for k in _dotted(values))}
            yield f"no setting {key!r}{_near(key, existing)}"


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
    if search == "grid" and not ranges and not choices.in_cycles:
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
            f"reduction_factor={scheduler.reduction_factor:g} compares no trials; raise "
            f"max_evaluations to reduction_factor or more"
        )


def _pbt_problems(sweep: SweepConfig) -> Iterator[str]:
    fixed = [key for key in sweep.space if key not in _MUTABLE]
    if fixed:
        yield (
            f"space: {', '.join(fixed)} cannot change during a trial, as pbt requires; "
            f"settings that can: {', '.join(_MUTABLE)}"
        )
    for key, dimension in sweep.space.items():
        if dimension.when:
            yield f"space.{key}.when: pbt changes every setting of every trial; drop the condition"
    if sweep.exclude:
        yield "exclude: pbt changes settings during trials; drop it"
    if sweep.search.name == "optuna":
        yield "search.name=optuna: pbt draws settings itself; set search.name=random"
    if sweep.repeats > 1:
        yield f"repeats={sweep.repeats}: trials of pbt continue from each other; set it to 1"
    if len(sweep.bases) > 1:
        yield "base: trials of pbt continue from each other; give one base"
    if sweep.budget.trials == 1:
        yield "budget.trials=1: trials of pbt continue from each other; use 2 or more"


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
            f"needs one that is measured during training, such as eval/knn_top1"
        )


def _near(key: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of plain values."""
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
