"""A sweep that cannot measure what decides is refused before it starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysl.errors import DataError
from raysl.evaluate.training_source import open_training_source
from raysl.run.recipe import RunConfig, run_from_values
from raysl.sources.source import Source
from raysl.sweep.config import MetricConfig
from raysl.sweep.measured import MetricCheck


def run_on(folder: Path, **sections: Any) -> tuple[RunConfig[Any], Source]:
    values = {
        "name": "r",
        "data": {"source": str(folder)},
        "method": {"name": "simclr"},
        "train": {"epochs": 2, "global_batch_size": 4},
        **sections,
    }
    config = run_from_values(values, where="test")
    return config, open_training_source(config.data, config.evaluate, config.method)


@pytest.fixture
def home(tmp_path: Path, draw_images: Callable[..., Path]) -> Path:
    draw_images(tmp_path / "p" / "cat", range(8))
    return tmp_path


@pytest.mark.parametrize("name", ["eval/knn_top1", "final/linear_lbfgs_top1"])
def test_a_metric_that_the_images_have_no_labels_for_is_found_beforehand(
    home: Path, name: str
) -> None:
    config, source = run_on(home / "p")  # one folder, so one class
    with pytest.raises(DataError, match=rf"metric.name={name}: .*has labels of one class only"):
        MetricCheck(MetricConfig(name=name)).check(config, source)


def test_a_metric_that_is_only_shown_may_be_missing(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = MetricConfig(name="eval/rankme", also=("eval/knn_top1", "eval/uniformity"))
    measured = MetricCheck(metric)
    measured.check(*run_on(home / "p"))
    measured.say_notes()
    said = capsys.readouterr().err
    assert "metric.also: no eval/knn_top1" in said
    assert "eval/uniformity" not in said


def test_labels_elsewhere_will_do(home: Path, draw_images: Callable[..., Path]) -> None:
    for name, numbers in (("dog", range(20, 26)), ("cow", range(30, 36))):
        draw_images(home / "labelled" / name, numbers)
    config, source = run_on(home / "p", evaluate={"source": str(home / "labelled")})
    MetricCheck(MetricConfig()).check(config, source)
