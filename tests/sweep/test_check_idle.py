"""Settings of a sweep's runs that are without effect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import ConfigError
from raysl.sweep.check import check
from raysl.sweep.config import SweepConfig
from raysl.sweep.space import draw, samples

Make = Callable[..., SweepConfig]
GRID = {"name": "grid"}
NAMES = {"grid": ["sgd", "adamw"]}


def _problems(sweep: SweepConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check(sweep, samples(sweep), folder=Path("runs"))
    return str(caught.value)


def _runs(sweep: SweepConfig) -> list[Any]:
    return [run.optim for run in check(sweep, draw(sweep), folder=Path("runs"))]


def test_what_the_space_makes_idle_of_set_or_base_leaves_with_it(sweep_of: Make) -> None:
    given = {"optim.sgd_momentum": 0.5, "optim.name": "sgd"}
    sweep = sweep_of(space={"optim.name": NAMES}, search=GRID, set={"optim.sgd_momentum": 0.5})
    assert [(o.name, o.sgd_momentum) for o in _runs(sweep)] == [("sgd", 0.5), ("adamw", 0.9)]
    assert "does nothing" in _problems(sweep_of(set=given | {"optim.name": "adamw"}))


def test_two_dimensions_of_which_one_puts_the_other_out_of_use_want_a_condition(
    sweep_of: Make,
) -> None:
    momenta = {"grid": [0.5, 0.8]}
    space = {"optim.name": NAMES, "optim.sgd_momentum": momenta}
    text = _problems(sweep_of(space=space, search=GRID))
    assert "optim.sgd_momentum=0.5 does nothing with optim.name=adamw" in text
    assert "or say when: space.optim.sgd_momentum.when" in text
    space = {"optim.name": NAMES, "optim.sgd_momentum": momenta | {"when": {"optim.name": "sgd"}}}
    found = _runs(sweep_of(space=space, search=GRID))
    assert [(o.name, o.sgd_momentum) for o in found] == [
        ("sgd", 0.5),
        ("sgd", 0.8),
        ("adamw", 0.9),
    ]
