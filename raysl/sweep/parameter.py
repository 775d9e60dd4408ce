"""Convert a sweep's parameters to axes: listed values as slots, ranges as bins."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from raysl.report.figure import drawable_name
from raysl.report.measure import number_text, short_names, value_text
from raysl.sweep.config import SEED, Dimension
from raysl.sweep.summary import is_number, varied_parameters
from raysl.sweep.trial import Trial

_MOST_LISTED = 8  # up to this many values of a range each have a slot of their own
_MOST_BINS = 6
_FEWEST_BINS = 3
_TRIALS_PER_BIN = 3  # in a cell of two parameters with equally many bins
_LOG_FROM = 10.0  # ratio of largest to smallest listed value for logarithmic bins


class Parameter(NamedTuple):
    """One parameter as an axis of slots: one for each value, or bins of its range."""

    key: str
    name: str
    """A short name in words."""
    values: tuple[Any, ...] = ()
    """The value of each slot, in order; empty if the slots are bins."""
    edges: tuple[float, ...] = ()
    """Edges of the bins, one more than slots."""
    is_log: bool = False
    """Whether the bins are even in the logarithm."""

    @property
    def is_binned(self) -> bool:
        """Whether its slots are bins."""
        return bool(self.edges)

    @property
    def is_label(self) -> bool:
        """Whether its values are not numbers."""
        return any(value is not None and not is_number(value) for value in self.values)

    @property
    def num_slots(self) -> int:
        """Number of slots of the axis."""
        return len(self.edges) - 1 if self.edges else len(self.values)

    def slot(self, value: Any) -> int:
        """Return the slot of a value, from 0."""
        if not self.edges:
            return self.values.index(value)
        return min(bisect_right(self.edges, value, 1) - 1, self.num_slots - 1)

    def texts(self) -> list[str]:
        """Return the text of each slot."""
        if not self.edges:
            return [value_text(value) for value in self.values]
        texts = self._edge_texts()
        return [f"{low} to {high}" for low, high in pairwise(texts)]

    def drawable_texts(self) -> list[str]:
        """Return the texts for a picture: short, and in letters that its font has."""
        return [
            drawable_name(text, otherwise=f"value {n}") for n, text in enumerate(self.texts(), 1)
        ]

    def tick_texts(self) -> list[str]:
        """Return the tick labels for a picture: one for each slot, or for each edge of the bins."""
        return self._edge_texts() if self.is_binned else self.drawable_texts()

    def _edge_texts(self) -> list[str]:
        return [number_text(float(f"{edge:.2g}")) for edge in self.edges]


def parameters(trials: Sequence[Trial], space: Mapping[str, Dimension]) -> list[Parameter]:
    """Return the parameters that differ between trials, in the space's order, without the seed.

    Args:
        trials: The trials whose values make the axes.
        space: The sweep's space: listed values keep its order, ranges its scale. Range values are
            binned, whole numbers only if there are more than a few.
    """
    chosen = [key for key in varied_parameters(trials) if key != SEED]
    names = short_names(chosen)
    axes = [_parameter(key, names[key], trials, space.get(key)) for key in chosen]
    return [parameter for parameter in axes if parameter.num_slots > 1]


def _parameter(
    key: str, name: str, trials: Sequence[Trial], dimension: Dimension | None
) -> Parameter:
    values_tried = list(dict.fromkeys(trial.params[key] for trial in trials if key in trial.params))
    space_values = dimension.labels() if dimension is not None and dimension.is_listed else []
    numbers = sorted(value for value in values_tried if is_number(value))
    is_real = dimension is not None and dimension.kind in ("uniform", "log_uniform")
    is_short = len(values_tried) <= (1 if is_real else _MOST_LISTED)
    if len(numbers) < len(values_tried) or set(values_tried) <= set(space_values) or is_short:
        return Parameter(key, name, values=tuple(_ordered(values_tried, space_values)))
    low, high = float(numbers[0]), float(numbers[-1])
    is_log = dimension is not None and dimension.kind in ("log_uniform", "log_int")
    if space_values:  # population based training may leave the list
        is_log = low > 0 and high / low >= _LOG_FROM
    num_bins = round(math.sqrt(len(trials) / _TRIALS_PER_BIN))
    num_bins = min(max(num_bins, _FEWEST_BINS), _MOST_BINS)
    spaced = np.geomspace if is_log else np.linspace
    return Parameter(
        key, name, edges=tuple(spaced(low, high, num_bins + 1).tolist()), is_log=is_log
    )


def _ordered(values_tried: Sequence[Any], space_values: Sequence[Any]) -> list[Any]:
    """Sort numbers by size, and labels in the order of the space; None comes first."""
    if all(value is None or is_number(value) for value in values_tried):
        return sorted(values_tried, key=lambda value: -math.inf if value is None else value)
    return [v for v in space_values if v in values_tried] + [
        v for v in values_tried if v not in space_values
    ]
