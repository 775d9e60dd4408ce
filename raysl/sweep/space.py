"""Draw the candidates of a sweep, and build the run of a candidate."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from raysl.config.load import (
    MISSING,
    Problem,
    bad_keys,
    get_key,
    plain_copy,
    set_key,
)
from raysl.errors import ConfigError
from raysl.run.recipe import (
    RunConfig,
    drop_idle,
    idle_problems,
    read_run_values,
    run_from_values,
)
from raysl.sweep.choices import Choices, Params, Pick, draw_random
from raysl.sweep.config import CONFIG, SEED, SweepConfig
from raysl.sweep.problems import MOST_CANDIDATES, problems_error, space_problems

TRIALS = "trials"
"""Name of the folder of the trials in the sweep's folder."""
EVERY = "evaluate.every"
"""The setting of the interval between evaluations."""

# Number of random candidates to draw from an infinite space without budget.trials, and the most to
# check for Optuna, which has no candidates in advance.
_SAMPLES = 50


class Candidate(NamedTuple):
    """One point of a sweep's space."""

    number: int
    """0, 1, ...; also the name of the trial's folder."""
    params: dict[str, Any]
    """Dotted setting (or ``config``, ``seed``) to the value to display: the value itself if it is a
    scalar, else its label."""
    values: dict[str, Any]
    """Dotted setting to its real value in the run; without ``config``."""
    base: str
    """Its base file."""


def trial_name(number: int) -> str:
    """Return the name of a trial's folder."""
    return f"{number:04d}"


def draw(sweep: SweepConfig) -> list[Candidate]:
    """Return all candidates of a grid or random search; none for Optuna, which suggests them later.

    The result depends on the sweep alone. Repeats of a candidate are adjacent, and a larger
    ``budget.trials`` appends candidates to the previous ones.

    Raises:
        ConfigError: Lists the problems of the space.
    """
    problems = space_problems(sweep)
    if problems:
        raise problems_error(problems, where=f"sweep {sweep.name}")
    if sweep.search.name == "optuna":
        return []
    choices = Choices(sweep)
    return [
        _candidate(sweep, choices, place * sweep.repeats + repeat, params, repeat=repeat)
        for place, params in enumerate(_draw_params(sweep, choices))
        for repeat in range(sweep.repeats)
    ]


def candidate_of(sweep: SweepConfig, number: int, pick: Pick, *, repeat: int = 0) -> Candidate:
    """Build a candidate whose values the caller chooses.

    Args:
        sweep: The sweep.
        number: The candidate's number.
        pick: Called for each dimension whose condition holds, after the dimensions it depends on;
            returns the label of one of its values, or a number in its range.
        repeat: Index of the repeat, from 0; it is added to the seed.
    """
    choices = Choices(sweep)
    return _candidate(sweep, choices, number, choices.choose(pick), repeat=repeat)


def samples(sweep: SweepConfig) -> list[Candidate]:
    """Return candidates for checking the space: those of :func:`draw` without their repeats.

    For Optuna, which has none in advance, they are random. An invalid sweep is accepted as far as
    possible, because its problems are found with these candidates.
    """
    choices = Choices(sweep)
    return [
        _candidate(sweep, choices, place, params, repeat=0)
        for place, params in enumerate(_draw_params(sweep, choices))
    ]


def _draw_params(sweep: SweepConfig, choices: Choices) -> list[Params]:
    trials = sweep.budget.trials
    if sweep.search.name == "grid":
        return list(islice(choices.combinations(), MOST_CANDIDATES))
    if sweep.search.name == "optuna":
        trials = min(trials or _SAMPLES, _SAMPLES)
    elif trials is None:
        trials = MOST_CANDIDATES if choices.is_finite else _SAMPLES
    return draw_random(choices, seed=sweep.seed, count=min(trials, MOST_CANDIDATES))


def _candidate(
    sweep: SweepConfig, choices: Choices, number: int, params: Params, *, repeat: int
) -> Candidate:
    base = sweep.bases[params[CONFIG]] if CONFIG in params else next(iter(sweep.bases.values()))
    values = {key: value for key, value in choices.values(params).items() if key != CONFIG}
    if sweep.repeats > 1:
        seed = choices.settings(params).get(SEED, 0) + repeat
        params, values = params | {SEED: seed}, values | {SEED: seed}
    return Candidate(number, params, values, str(base))


def run_config(sweep: SweepConfig, candidate: Candidate, *, folder: Path | str) -> RunConfig[Any]:
    """Build the configuration of a candidate; its run folder is ``folder/trials/NUMBER``.

    Args:
        sweep: The sweep.
        candidate: One of its candidates.
        folder: Path or address of the sweep's folder.

    Raises:
        ConfigError: Lists every bad key at once.
    """
    where = f"{candidate.base}, trial {trial_name(candidate.number)}"
    values, problems = run_values(sweep, candidate, folder=folder)
    if problems:
        raise bad_keys(problems, where=where)
    return run_from_values(values, where=where)


def run_values(
    sweep: SweepConfig, candidate: Candidate, *, folder: Path | str
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the plain, unvalidated values of a candidate's run, and settings that failed.

    Raises:
        ConfigError: If the base file cannot be read.
    """
    values = plain_copy(read_run_values(Path(candidate.base)))
    problems: list[Problem] = []
    with suppress(ConfigError):  # an invalid section is reported separately
        set_key(values, "evaluate.final", plain_copy({"final": sweep.final})["final"])
    for given in (sweep.set, candidate.values):
        base_values = plain_copy(values)
        for key in sorted(given, key=lambda key: key.count(".")):  # a section before its keys
            try:
                set_key(values, key, given[key])
            except ConfigError as error:
                problems.append(Problem(tuple(key.split(".")), f"{key}: {error}"))
        values = drop_idle(base_values, values, list(given))
    problems += list(_idle_settings(values, candidate))
    for key, value in (_fixed_settings(sweep) | _intervals(sweep, candidate, values)).items():
        with suppress(ConfigError):  # an invalid section is reported separately
            set_key(values, key, value)
    sweep_settings = {
        "name": trial_name(candidate.number),
        "output_dir": f"{folder}/{TRIALS}",
        # The sweep's own process reports all trials to MLflow.
        "track": sweep.track.model_dump(mode="json") | {"mlflow": False},
    }
    return values | sweep_settings, problems


def _idle_settings(values: Mapping[str, Any], candidate: Candidate) -> Iterator[Problem]:
    """Yield a problem for each setting without effect, with advice if the sweep varies it."""
    for problem in idle_problems(values):
        key = ".".join(problem.place)
        advice = f", or say when: space.{key}.when" if key in candidate.values else ""
        yield problem._replace(text=problem.text + advice)


def _fixed_settings(sweep: SweepConfig) -> dict[str, Any]:
    """Return the sweep's settings for the length of trials and for measurements."""
    budget = sweep.budget
    length = {"train.epochs": budget.epochs, "train.steps": budget.steps}
    has_length = budget.epochs is not None or budget.steps is not None
    fixed: dict[str, Any] = (length if has_length else {}) | {"evaluate.online": "blocking"}
    if "evaluate.pixel_baseline" not in sweep.set:  # the same for all trials: nothing to compare
        fixed["evaluate.pixel_baseline"] = False
    return fixed


def _intervals(
    sweep: SweepConfig, candidate: Candidate, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the interval of evaluations, and of checkpoints if the scheduler pauses trials."""
    scheduler, period = sweep.scheduler, decision_period(sweep)
    every = get_key(values, EVERY)
    if not gives_every(sweep, candidate):
        if scheduler.name == "hyperband":
            every = {"fraction": 1 / scheduler.max_evaluations}
        elif period is not None and not meets(
            every, period, total_epochs=length_epochs(sweep, values)
        ):
            every = {"epochs": period}
        elif every is None:
            every = {"fraction": 1.0}
    pace = {} if every is MISSING else {EVERY: every}
    if scheduler.name in ("hyperband", "pbt"):
        pace |= {"train.checkpoint_every": every, "train.keep_checkpoints": 2}
    return pace


def decision_period(sweep: SweepConfig) -> float | None:
    """Return the epochs between the scheduler's decisions; None if it does not count in epochs."""
    scheduler = sweep.scheduler
    if scheduler.name == "asha":
        return scheduler.grace_epochs
    return scheduler.perturb_every_epochs if scheduler.name == "pbt" else None


def gives_every(sweep: SweepConfig, candidate: Candidate) -> bool:
    """Return whether the sweep itself, not a base file, sets the evaluation interval."""
    keys = (*sweep.set, *candidate.values)
    return any(key == EVERY or key.startswith(EVERY + ".") for key in keys)


def length_epochs(sweep: SweepConfig, values: Mapping[str, Any]) -> float | None:
    """Return the epochs of a run; None if its length is in steps, or invalid."""
    epochs = sweep.budget.epochs or get_key(values, "train.epochs")
    return None if sweep.budget.steps or not isinstance(epochs, int | float) else epochs


def meets(every: Any, period: float, *, total_epochs: float | None) -> bool:
    """Return whether there is an evaluation at every multiple of a period.

    Args:
        every: The evaluation interval, as a plain value.
        period: The period, in epochs.
        total_epochs: Epochs of the run; None if unknown.
    """
    spacing = every.get("epochs") if isinstance(every, dict) else None
    if isinstance(every, dict) and "fraction" in every and total_epochs is not None:
        spacing = every["fraction"] * total_epochs
    if not isinstance(spacing, int | float) or spacing <= 0:
        return False
    ratio = period / spacing
    return round(ratio) >= 1 and math.isclose(ratio, round(ratio))
