"""The step of a run is measured on Ray: in actors, and as a whole run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raysl.benchmark.ray_step import measure_on_ray
from raysl.benchmark.step import RAY, RUN, StepRequest, measure_run, request_for
from raysl.run.recipe import load_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster", "undrawn")]


@pytest.fixture
def two_workers(run_yaml: Callable[[str], Path]) -> StepRequest:
    overrides = ["train.log_every=2", "cluster.num_train_workers=2"]
    return request_for(load_run(run_yaml("small"), overrides), steps=4)


def test_actors_train_together(two_workers: StepRequest) -> None:
    cost = measure_on_ray(two_workers._replace(form=RAY))
    assert cost.ms > 0
    assert cost.peak_bytes > 50 << 20


def test_a_whole_run_tells_what_its_steps_take_and_wait(two_workers: StepRequest) -> None:
    cost = measure_run(two_workers._replace(form=RUN))
    assert cost.ms > 0
    assert cost.peak_bytes > 50 << 20
    assert cost.wait_share is not None
    assert 0 <= cost.wait_share <= 1
