"""Check a sweep and all its runs before anything starts, and report all problems at once."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysl.config.load import MISSING, Problem, drop_key, get_key, plain_copy, read_mapping
from raysl.errors import ConfigError, RayslError
from raysl.evaluate.old_keys import resolve_final
from raysl.methods import load_method
from raysl.run.recipe import RunConfig, run_or_problems
from raysl.sweep.choices import Choices, options
from raysl.sweep.config import Dimension, Scalar, SweepConfig
from raysl.sweep.problems import (
    FINAL_METRICS,
    MEASURED_SECTIONS,
    OF_CLASSIFIERS,
    problems_error,
    space_problems,
)
from raysl.sweep.space import (
    EVERY,
    Candidate,
    candidate_of,
    decision_period,
    gives_every,
    length_epochs,
    meets,
    run_values,
    samples,
)
from raysl.track.results import TRAINING

RunCheck = Callable[[RunConfig[Any]], None]
"""Raises RayslError if a run cannot start on its images."""

# How often bad keys are removed from a run to find further problems.
_MAX_REPAIRS = 3


def check(
    sweep: SweepConfig,
    candidates: Sequence[Candidate],
    *,
    folder: Path | str,
    check_run: RunCheck | None = None,
) -> list[RunConfig[Any]]:
    """Check a sweep and all its runs.

    In addition to the candidates, each value of each dimension and both ends of each range are
    checked once; if there are no candidates in advance, some random ones too.

    Args:
        sweep: The sweep.
        candidates: The result of :func:`raysl.sweep.space.draw`.
        folder: Path or address of the sweep's folder.
        check_run: Checks the images of each run; None skips this.

    Returns:
        The runs of the candidates.

    Raises:
        ConfigError: Lists every distinct problem of the sweep and of its runs, with the number of
            affected candidates and the parameters of one.
    """
    problems = space_problems(sweep)
    run_problems, runs = _run_problems(
        sweep, candidates or samples(sweep), folder=folder, check_run=check_run
    )
    if problems or run_problems:
        raise problems_error([*problems, *run_problems], where=f"sweep {sweep.name}")
    return runs if candidates else []


def all_problems(sweep: SweepConfig, *, invalid: Iterable[str] = ()) -> list[str]:
    """List the problems of a sweep and of the runs that can be drawn from it.

    Args:
        sweep: The sweep, possibly without the invalid parts of its file.
        invalid: The dimensions that were left out of it because they are invalid.
    """
    run_problems, _ = _run_problems(sweep, samples(sweep), folder=Path(), check_run=None)
    return [*space_problems(sweep, invalid=invalid), *run_problems]


class _FoundProblem:
    """A problem, with the number of candidates that have it and the parameters of one."""

    def __init__(self, text: str, example: Mapping[str, Any]) -> None:
        self.text = text
        self.example = example
        self.count = 0

    def line(self, total: int) -> str:
        """Describe the problem and its candidates in one line, ``total`` candidates in all."""
        example = " ".join(f"{key}={value}" for key, value in self.example.items())
        if not example or (total == 1 and self.count == 1):
            return self.text
        if self.count == total:
            return f"{self.text} (all {total} candidates)"
        many = f"{self.count} of {total} candidates, " if self.count else ""
        return f"{self.text} ({many}such as {example})"


def _run_problems(
    sweep: SweepConfig,
    candidates: Sequence[Candidate],
    *,
    folder: Path | str,
    check_run: RunCheck | None,
) -> tuple[list[str], list[RunConfig[Any]]]:
    """Return the problems of the runs, one line each, and the valid runs of the candidates."""
    unreadable = {str(base) for base in sweep.bases.values() if not _can_be_read(base)}
    runs: list[RunConfig[Any]] = []
    seen: dict[tuple[Any, ...], _FoundProblem] = {}
    for index, candidate in enumerate([*candidates, *_probes(sweep, candidates)]):
        if candidate.base in unreadable:
            continue
        problems, run = _problems_of(sweep, candidate, folder=folder, check_run=check_run)
        is_candidate = index < len(candidates)
        if run is not None and is_candidate:
            runs.append(run)
        for problem in problems:
            # The same problem with another number counts as the same.
            key = (problem.place, re.sub(r"\d[\d.,e+-]*", "#", problem.text))
            entry = seen.setdefault(key, _FoundProblem(problem.text, candidate.params))
            entry.count += is_candidate
    return [entry.line(len(candidates)) for entry in seen.values()], runs


def _probes(sweep: SweepConfig, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yield candidates with values and ends of ranges that no other candidate has."""
    choices = Choices(sweep)
    for name, dimension in choices.dimensions.items():
        ends = dimension.labels() if dimension.is_listed else list(dimension.bounds)
        tried = [candidate.params.get(name, MISSING) for candidate in candidates]
        required = choices.demands(name) or {}
        for label in ends:
            if label in tried:
                continue
            wanted = required | {name: label}

            def pick(key: str, other: Dimension, wanted: Mapping[str, Scalar] = wanted) -> Scalar:
                return wanted[key] if key in wanted else options(other)[0]

            candidate = candidate_of(sweep, len(candidates), pick)
            if name in candidate.params and not choices.is_excluded(candidate.params):
                yield candidate


def _can_be_read(base: Path) -> bool:
    try:
        read_mapping(base)
    except ConfigError:
        return False
    return True


def _problems_of(
    sweep: SweepConfig, candidate: Candidate, *, folder: Path | str, check_run: RunCheck | None
) -> tuple[list[Problem], RunConfig[Any] | None]:
    """Return the problems of a run, and the run if it can be built."""
    values, problems = run_values(sweep, candidate, folder=folder)
    problems += [Problem((), text) for text in _trial_problems(sweep, candidate, values)]
    outcome = run_or_problems(values)
    if isinstance(outcome, list):
        return [*outcome, *_hidden_problems(outcome, values), *problems], None
    if check_run is not None:
        try:
            check_run(outcome)
        except RayslError as error:
            problems.append(Problem((), str(error)))
    return problems, outcome


def _hidden_problems(problems: Sequence[Problem], values: dict[str, Any]) -> list[Problem]:
    """Return problems that bad keys hide: invalid combinations of the remaining settings."""
    values, bad = plain_copy(values), list(problems)
    for _ in range(_MAX_REPAIRS):
        places = [problem.place for problem in bad if problem.place]
        if not places:
            return []
        for place in places:
            drop_key(values, ".".join(place))
        outcome = run_or_problems(values)
        if isinstance(outcome, RunConfig):
            return []
        together = [problem for problem in outcome if not problem.place]
        if together:
            left_out = [".".join(problem.place) for problem in problems if problem.place]
            return [p for p in together if not any(key in p.text for key in left_out)]
        bad = outcome
    return []


def _trial_problems(
    sweep: SweepConfig, candidate: Candidate, values: Mapping[str, Any]
) -> Iterator[str]:
    """Yield mismatches between a run and the sweep's scheduler and metric."""
    period, epochs = decision_period(sweep), length_epochs(sweep, values)
    name = "grace_epochs" if sweep.scheduler.name == "asha" else "perturb_every_epochs"
    if period is not None and epochs is None:
        yield f"scheduler {sweep.scheduler.name} counts in epochs; set budget.epochs, not steps"
    elif period is not None and epochs is not None and period >= epochs:
        yield (
            f"scheduler.{name}={period:g}: trials of {epochs:g} epochs end before it; lower it, or "
            f"raise budget.epochs"
        )
    if gives_every(sweep, candidate):
        yield from _pace_problems(sweep, values)
    section = sweep.metric.name.partition("/")[0]
    method = get_key(values, "method.name")
    if section not in MEASURED_SECTIONS and section != method:
        yield f"metric.name={sweep.metric.name}: method {method} does not measure it"
    if isinstance(get_key(values, "cluster.num_train_workers"), dict):
        yield (
            "cluster.num_train_workers: trials share the cluster, so each has a fixed number of "
            "train workers; give one number"
        )
    yield from _classifier_problems(sweep, str(method))
    yield from _unmeasured(sweep, values)


def _unmeasured(sweep: SweepConfig, values: Mapping[str, Any]) -> Iterator[str]:
    """Reject metrics of the end of a trial that its ``evaluate.final`` leaves out."""
    section = resolve_final(values).get("evaluate")
    section = section if isinstance(section, dict) else {}
    final = section.get("final", ())
    leaves_out_untrained = (
        set(final) <= {"knn", *TRAINING} and section.get("untrained_baseline") is not True
    )
    given = sweep.final if isinstance(sweep.final, str) else f"[{', '.join(sweep.final)}]"
    for name in (sweep.metric.name, *sweep.metric.also):
        protocol = FINAL_METRICS.get(name)
        if protocol is not None and protocol not in final:
            yield f"{name}: final={given} leaves it unmeasured; add {protocol} to final"
        elif name.startswith("final/untrained_") and leaves_out_untrained:
            yield f"{name}: set evaluate.untrained_baseline=true, which final={given} leaves out"


def _classifier_problems(sweep: SweepConfig, method: str) -> Iterator[str]:
    """Reject metrics of features if a classifier is trained, and vice versa."""
    try:
        classifies = load_method(method).Config.classifies
    except ConfigError:  # an unknown method is already a problem of the run
        return
    for name in (sweep.metric.name, *sweep.metric.also):
        if name in OF_CLASSIFIERS and not classifies:
            yield f"{name}: method {method} trains no classifier; use eval/knn_top1"
        elif "top1" in name and name not in OF_CLASSIFIERS and classifies:
            yield f"{name}: method {method} trains a classifier; use eval/top1"


def _pace_problems(sweep: SweepConfig, values: Mapping[str, Any]) -> Iterator[str]:
    """Reject evaluation intervals in the sweep that do not match its scheduler."""
    every, period = get_key(values, EVERY), decision_period(sweep)
    if sweep.scheduler.name == "hyperband":
        yield f"{EVERY}: hyperband spaces evaluations by scheduler.max_evaluations; leave it out"
    elif period is not None and not meets(every, period, total_epochs=length_epochs(sweep, values)):
        yield (
            f"{EVERY}={every}: scheduler {sweep.scheduler.name} decides every {period:g} epochs, "
            f"and needs an evaluation then; leave it out"
        )
    elif every is None:
        yield f"{EVERY}=null: a sweep reads its metric from evaluations; set an interval"
