"""What a sweep asks of Tune, without starting it."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raysl.sweep import ray_tune
from raysl.sweep.config import SweepConfig
from raysl.sweep.ray_schedulers import Asha, HyperBand, Pbt
from raysl.sweep.ray_shares import Shares

Make = Callable[..., SweepConfig]
ONE_CPU = Shares(2, 1.0, 0.5, nested=False, why="")
NESTED = Shares(2, 0.0, 0.0, nested=True, why="")


class Listed:
    """Suggests trials from a list."""

    def __init__(self, *numbers: int) -> None:
        self.left = list(numbers)

    def next(self) -> tuple[int, Mapping[str, Any]] | None:
        return (self.left.pop(0), {"optim.base_lr": 0.1}) if self.left else None

    def ended(self, number: int) -> None:
        pass


class Running:
    """Stands for the callback: so many trials run."""

    num_running = 0


def search(
    *numbers: int, most: int | None = None, scheduler: Any = None
) -> tuple[ray_tune._Search, Running]:
    running = Running()
    callback: Any = running
    return ray_tune._Search(Listed(*numbers), callback, scheduler, max_running=most), running


class TestSearch:
    def test_hands_out_each_trial_once_with_its_settings(self) -> None:
        found, _ = search(4, 7)
        assert found.suggest("a") == {"number": 4, "optim.base_lr": 0.1}
        assert found.suggest("b") == {"number": 7, "optim.base_lr": 0.1}
        assert found.suggest("c") == Searcher.FINISHED

    def test_waits_while_as_many_run_as_may(self) -> None:
        found, running = search(4, most=2)
        running.num_running = 2
        assert found.suggest("a") is None
        running.num_running = 1
        assert found.suggest("a")["number"] == 4

    def test_tells_hyperband_that_there_are_no_more(self, monkeypatch: Any) -> None:
        told: list[str] = []

        class Heard(HyperBand):
            def __init__(self) -> None:
                """Needs nothing here."""

            def all_added(self) -> None:
                told.append("no more")

        found, _ = search(4, scheduler=Heard())
        found.suggest("a")
        assert told == []
        found.suggest("b")
        assert told == ["no more"]


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        ({"name": "none"}, FIFOScheduler),
        ({"name": "asha"}, Asha),
        ({"name": "hyperband"}, HyperBand),
        ({"name": "pbt"}, Pbt),
    ],
)
def test_each_scheduler_of_the_configuration_has_its_class(
    sweep_of: Make, scheduler: dict[str, Any], kind: type
) -> None:
    space = {"optim.base_lr": {"log_uniform": [1.0e-4, 1.0e-2]}}
    sweep = sweep_of(space=space, scheduler=scheduler, budget={"trials": 4})
    assert type(ray_tune._scheduler(sweep)) is kind


@pytest.mark.parametrize(
    ("dimension", "inside"),
    [
        ({"uniform": [0.25, 0.5]}, lambda value: 0.25 <= value <= 0.5),
        ({"log_uniform": [1.0e-4, 1.0e-2]}, lambda value: 1e-4 <= value <= 1e-2),
        ({"int": [3, 4]}, lambda value: value in (3, 4)),
        ({"log_int": [3, 4]}, lambda value: value in (3, 4)),
    ],
)
def test_a_range_draws_within_its_bounds_and_whole_numbers_reach_both(
    sweep_of: Make, dimension: dict[str, Any], inside: Callable[[Any], bool]
) -> None:
    key = "method.queue_length" if "int" in next(iter(dimension)) else "optim.base_lr"
    (one,) = sweep_of(space={key: dimension}, budget={"trials": 4}).space.values()
    drawn = [ray_tune._domain(one).sample() for _ in range(40)]
    assert all(map(inside, drawn))
    assert len(set(drawn)) > 1


def test_listed_values_are_drawn_by_their_labels(sweep_of: Make) -> None:
    sweep = sweep_of(space={"method.temperature": {"grid": [0.1, 0.5]}}, search={"name": "grid"})
    (one,) = sweep.space.values()
    assert ray_tune._domain(one) == one.labels()


def test_a_trial_reserves_its_share_and_one_with_workers_a_sliver() -> None:
    assert ray_tune._resources(ONE_CPU) == {"CPU": 1.0, "GPU": 0.5}
    assert ray_tune._resources(NESTED) == {"CPU": 0.01}


def test_population_based_training_gets_all_trials_as_points() -> None:
    _, space = ray_tune._all_points(Listed(0, 1, 2))
    assert space["number"].categories == [0, 1, 2]
    assert space["optim.base_lr"].categories == [0.1] * 3


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("Traceback ...\n  File x\nValueError: no room\n\n"), "ValueError: no room"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_the_reason_of_a_failure_is_its_last_line(error: Exception, line: str) -> None:
    assert ray_tune._reason(error) == line
