"""Enumerate and draw combinations of a sweep's dimensions, respecting their conditions."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from raysl.config.load import MISSING, get_key, plain_copy, read_mapping, set_key
from raysl.errors import ConfigError
from raysl.run.recipe import RunConfig, run_or_problems
from raysl.sweep.config import CONFIG, Dimension, Scalar, SweepConfig

Params = dict[str, Any]
"""For each dimension, its displayed value: a scalar, or a label."""
Pick = Callable[[str, Dimension], Scalar]
"""Chooses the displayed value of a dimension."""

# A draw that repeats an earlier one is retried. After this many failures in a row, few or
# no new combinations are left, and enumerating them is faster.
_ATTEMPTS = 32
_DIGITS = 4  # significant digits of drawn real numbers
_ORDER = "\0order"  # a stream name that no dimension has


class Choices:
    """The dimensions of a sweep, sorted so that each condition only depends on earlier ones.

    Args:
        sweep: The sweep; conditions on missing base files do not hold.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self._sweep = sweep
        self.dimensions: dict[str, Dimension] = dict(sweep.space)
        if len(sweep.bases) > 1:
            self.dimensions = {CONFIG: Dimension(grid=tuple(sweep.bases)), **self.dimensions}
        self.order, self.in_cycles = self._sorted()
        self._settings: dict[str, dict[str, Any]] = {}

    @property
    def is_finite(self) -> bool:
        """Whether all combinations can be listed."""
        return all(each.is_listed or each.is_whole for each in self.dimensions.values())

    def targets(self, name: str) -> list[str]:
        """Return the dimensions that a dimension's condition depends on."""
        keys = self.dimensions[name].when
        return [other for other in self.dimensions if any(_covers(other, key) for key in keys)]

    def choose(self, pick: Pick) -> Params:
        """Return the choice of ``pick`` for each dimension that exists, given earlier choices."""
        params: Params = {}
        for name in self.order:
            if self.exists(name, params):
                params[name] = pick(name, self.dimensions[name])
        return self._in_space_order(params)

    def combinations(self, names: Iterable[str] | None = None) -> Iterator[Params]:
        """Yield every combination of finite dimensions; the last one changes fastest.

        Args:
            names: Restrict the combinations, and the sweep's exclusions, to these dimensions; None
                for all.
        """
        wanted = set(self.order if names is None else names)
        chosen = [name for name in self.order if name in wanted]

        def extend(params: Params, rest: Sequence[str]) -> Iterator[Params]:
            if not rest:
                if not self.is_excluded(params, names=chosen):
                    yield self._in_space_order(params)
            elif not self.exists(rest[0], params):
                yield from extend(params, rest[1:])
            else:
                for label in options(self.dimensions[rest[0]]):
                    yield from extend(params | {rest[0]: label}, rest[1:])

        return extend({}, chosen)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Convert displayed values to real values."""
        return {name: self.dimensions[name].value_of(label) for name, label in params.items()}

    def exists(self, name: str, params: Mapping[str, Any]) -> bool:
        """Return whether a dimension's condition holds, given choices for what it depends on."""
        return all(
            self.holds(key, wanted, params) for key, wanted in self.dimensions[name].when.items()
        )

    def holds(self, key: str, wanted: Any, params: Mapping[str, Any]) -> bool:
        """Return whether a setting has the value, or one of the values, that a condition names."""
        names = self._values_in_conditions(key, params)
        return any(value in names for value in (wanted if isinstance(wanted, list) else [wanted]))

    def is_excluded(self, params: Mapping[str, Any], *, names: Iterable[str] | None = None) -> bool:
        """Return whether the sweep excludes a combination.

        Args:
            params: The combination.
            names: The dimensions that were chosen; None for all.
        """
        undecided = set(self.dimensions) - set(self.dimensions if names is None else names)
        return any(
            all(self.holds(key, wanted, params) for key, wanted in conditions.items())
            for conditions in self._sweep.exclude
            if conditions
            and not any(_covers(name, key) for name in undecided for key in conditions)
        )

    def demands(self, name: str) -> Params | None:
        """Return choices for other dimensions under which this one exists, or None."""
        for start in self.combinations([CONFIG]):
            required = self._demands(name, start)
            if self.exists(name, required):
                return required
        return None

    def _demands(self, name: str, start: Params) -> Params:
        """Choose values for the dimensions that a condition depends on, recursively."""
        required = dict(start)
        conditions = list(self.dimensions[name].when.items())
        for key, wanted in conditions:
            for other in self.dimensions:
                if other in required or not _covers(other, key):
                    continue
                for label in options(self.dimensions[other]):
                    if self.holds(key, wanted, required | {other: label}):
                        required[other] = label
                        conditions += self.dimensions[other].when.items()
                        break
        return required

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return a run's settings without those of the space: defaults, base file, ``set``."""
        label = str(params.get(CONFIG, next(iter(self._sweep.bases))))
        if label not in self._settings:
            self._settings[label] = self._read_settings(label)
        return self._settings[label]

    def _read_settings(self, label: str) -> dict[str, Any]:
        """Return the settings of a base file with ``set``, as far as they are valid."""
        try:
            values = plain_copy(read_mapping(self._sweep.bases[label]))
        except ConfigError:
            return {}
        for attempt in (with_set(self._sweep, values), values):
            outcome = run_or_problems({"name": label, **attempt})
            if isinstance(outcome, RunConfig):
                return with_set(self._sweep, outcome.model_dump(mode="json"))
        return with_set(self._sweep, values)

    def _values_in_conditions(self, key: str, params: Mapping[str, Any]) -> list[Any]:
        """Return the names that a condition may use for a setting's value; none if unset."""
        if key in params:
            return [params[key], self.dimensions[key].value_of(params[key])]
        for name, label in params.items():
            if _covers(name, key):
                value = get_key(self.dimensions[name].value_of(label), key[len(name) + 1 :])
                return [] if value is MISSING else [value]
        if key == CONFIG:
            return [next(iter(self._sweep.bases))]
        value = get_key(self.settings(params), key)
        return [] if value is MISSING else [value]

    def _sorted(self) -> tuple[list[str], list[str]]:
        """Return the dimensions in dependency order, and those in a cycle."""
        order: list[str] = []
        rest = list(self.dimensions)
        while rest:
            ready = [name for name in rest if not set(self.targets(name)) - set(order)]
            if not ready:
                return [*order, *rest], rest
            order.append(ready[0])
            rest.remove(ready[0])
        return order, []

    def _in_space_order(self, params: Params) -> Params:
        return {name: params[name] for name in self.dimensions if name in params}


def with_set(sweep: SweepConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a run's plain values with ``set``; keys that cannot be set are skipped."""
    result = plain_copy(values)
    for key, value in sweep.set.items():
        with suppress(ConfigError):  # reported when the runs are checked
            set_key(result, key, value)
    return plain_copy(result)


def draw_random(choices: Choices, *, seed: int, count: int) -> list[Params]:
    """Draw distinct combinations.

    Each combination of the grids occurs equally often; the rest is drawn. A value only depends on
    the seed, on the number of earlier draws, and on its dimension's name: adding a dimension leaves
    the others unchanged, and a larger count starts with the same combinations.

    Args:
        choices: The dimensions.
        seed: 0 <= seed < 2**63.
        count: Number of draws; if there are fewer combinations, each occurs once.
    """
    cycle = list(choices.combinations(_independent_grids(choices)))
    drawn: dict[str, Params] = {}
    draw = stale = 0
    while len(drawn) < count and stale < len(cycle):
        turn, spot = divmod(draw, len(cycle))
        fixed = cycle[int(_stream(seed, turn, _ORDER).permutation(len(cycle))[spot])]
        new = _draw_new(choices, drawn, fixed, seed=seed, draw=draw)
        stale = 0 if new else stale + 1
        drawn |= new
        draw += 1
    for params in choices.combinations() if len(drawn) < count else ():
        drawn.setdefault(json.dumps(params), params)
        if len(drawn) == count:
            break
    return list(drawn.values())


def _draw_new(
    choices: Choices, drawn: Mapping[str, Params], fixed: Params, *, seed: int, draw: int
) -> dict[str, Params]:
    """Draw a combination that is not in ``drawn``, by its JSON text; empty if attempts fail."""
    for attempt in range(_ATTEMPTS):

        def pick(name: str, dimension: Dimension, attempt: int = attempt) -> Scalar:
            if name in fixed:
                return fixed[name]  # type: ignore[no-any-return]
            return sample(dimension, float(_stream(seed, draw, name, attempt).random()))

        params = choices.choose(pick)
        if json.dumps(params) not in drawn and not choices.is_excluded(params):
            return {json.dumps(params): params}
    return {}


def sample(dimension: Dimension, share: float) -> Scalar:
    """Return the displayed value at a fraction in [0, 1) of a dimension."""
    if dimension.is_listed:
        labels = dimension.labels()
        return labels[int(share * len(labels))]
    low, high = dimension.bounds
    end = high + 1 if dimension.is_whole else high
    if dimension.is_log:
        value = math.exp(math.log(low) + share * (math.log(end) - math.log(low)))
    else:
        value = low + share * (end - low)
    if dimension.is_whole:
        return min(max(math.floor(value), int(low)), int(high))
    return min(max(float(f"{value:.{_DIGITS}g}"), low), high)  # short enough to type


def _independent_grids(choices: Choices) -> list[str]:
    """Return the grids that do not depend on drawn dimensions."""
    names: list[str] = []
    for name in choices.order:
        if choices.dimensions[name].kind == "grid" and set(choices.targets(name)) <= set(names):
            names.append(name)
    return names


def options(dimension: Dimension) -> Sequence[Scalar]:
    """Return the displayed values of a dimension; for a range of real numbers, its ends."""
    if dimension.is_listed:
        return dimension.labels()
    low, high = dimension.bounds
    return range(int(low), int(high) + 1) if dimension.is_whole else [low, high]


def _covers(name: str, key: str) -> bool:
    """Return whether a dimension sets a setting or a section that contains it."""
    return key == name or key.startswith(name + ".")


def _stream(seed: int, draw: int, name: str, attempt: int = 0) -> np.random.Generator:
    """Return the random stream of one dimension of one draw, from a counter-based generator."""
    word = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    key = np.array([seed, draw], dtype=np.uint64)
    counter = np.array([0, 0, attempt, word], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
