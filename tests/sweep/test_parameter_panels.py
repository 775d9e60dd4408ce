from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from raysl.errors import DataError
from raysl.sweep import parameter_panels
from raysl.sweep.config import Dimension, MetricConfig
from raysl.sweep.parameter import parameters
from raysl.sweep.parameter_panels import draw_parameters

METRIC = MetricConfig()


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draw trials and return the figure, instead of its file."""
    drawn: list[Figure] = []
    monkeypatch.setattr(parameter_panels, "save_png", lambda figure, path: drawn.append(figure))

    def draw(
        trials: list[Any], space: dict[str, Dimension] | None = None, best: Any = None
    ) -> Figure:
        found = parameters(trials, space or {})
        draw_parameters(tmp_path / "a.png", trials, METRIC, found, best=best)
        return drawn[-1]

    return draw


def marks(axes: Any, shape: str) -> list[tuple[float, float]]:
    """Return where marks of a shape stand: the place, without its spread, and the height."""
    points = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == shape]
    return [(round(float(x)), round(float(y), 6)) for x, y in points]


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_xticklabels()]


class TestDrawParameters:
    def test_every_trial_stands_at_its_value_and_height(self, figure: Any, make_trial: Any) -> None:
        values = {64: 0.5, 128: 0.7, 256: 0.6}
        trials = [make_trial(n, {"a.x": x}, [y]) for n, (x, y) in enumerate(values.items())]
        (axes,) = figure(trials).axes
        assert marks(axes, "o") == [(0, 50.0), (1, 70.0), (2, 60.0)]
        assert labels(axes) == ["64", "128", "256"]

    def test_a_range_has_its_own_scale(self, figure: Any, make_trial: Any) -> None:
        trials = [make_trial(n, {"a.x": 10.0**n}, [0.5]) for n in range(4)]
        (log,) = figure(trials, {"a.x": Dimension(log_uniform=(1, 1000))}).axes
        (even,) = figure(trials, {"a.x": Dimension(uniform=(1, 1000))}).axes
        assert (log.get_xscale(), even.get_xscale()) == ("log", "linear")
        assert [x for x, _ in marks(log, "o")] == [1, 10, 100, 1000]

    def test_statuses_look_different_and_failed_ones_lie_at_the_foot(
        self, figure: Any, make_trial: Any
    ) -> None:
        statuses = ["finished", "stopped", "failed", "running", "waiting"]
        trials = [
            make_trial(n, {"a.x": n}, [0.5] if status != "waiting" else [], status=status)
            for n, status in enumerate(statuses)
        ]
        drawn = figure(trials)
        (axes,) = drawn.axes
        assert [x for x, _ in marks(axes, "o")] == [0, 1]
        assert marks(axes, "x") == [(2, round(axes.get_ylim()[0], 6))]
        assert [x for x, _ in marks(axes, ">")] == [3]
        shown = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert shown == ["finished", "stopped early", "not ended", "failed"]

    def test_bars_are_medians_of_finished_trials(self, figure: Any, make_trial: Any) -> None:
        values = [("a", 0.1), ("a", 0.5), ("a", 0.6), ("b", 0.4)]
        trials = [make_trial(n, {"x": x}, [y]) for n, (x, y) in enumerate(values)]
        trials.append(make_trial(9, {"x": "b"}, [0.9], status="stopped"))
        (axes,) = figure(trials).axes
        heights = [bar.get_segments()[0][0][1] for bar in axes.collections]
        assert heights == pytest.approx([50, 40])

    def test_labels_stand_best_first_and_numbers_by_size(
        self, figure: Any, make_trial: Any
    ) -> None:
        rows = [("worst", 1, 0.1), ("best", 2, 0.9), ("middle", 3, 0.5)]
        trials = [make_trial(n, {"m": m, "x": x}, [y]) for n, (m, x, y) in enumerate(rows)]
        by_label, by_number = figure(trials).axes
        assert labels(by_label) == ["best", "middle", "worst"]
        assert labels(by_number) == ["1", "2", "3"]

    def test_the_best_one_is_marked_and_named(self, figure: Any, make_trial: Any) -> None:
        trials = [make_trial(n, {"x": n}, [0.5 + n / 10]) for n in range(3)]
        drawn = figure(trials, best=trials[2])
        assert marks(drawn.axes[0], "*") == [(2, 70.0)]
        assert drawn.legends[0].get_texts()[0].get_text() == "best: trial 2, 70.0"

    def test_a_collapsed_trial_lies_at_the_edge_and_leaves_the_scale(
        self, figure: Any, make_trial: Any
    ) -> None:
        trials = [make_trial(n, {"x": n}, [0.8 + n / 100]) for n in range(6)]
        trials[3] = make_trial(3, {"x": 3}, [0.1])
        (axes,) = figure(trials).axes
        low, high = axes.get_ylim()
        assert low > 75
        assert high < 90
        assert marks(axes, "o")[3] == (3, round(low, 6))

    def test_trials_that_lack_a_parameter_are_missing_in_its_panel_only(
        self, figure: Any, make_trial: Any
    ) -> None:
        trials = [make_trial(n, {"x": n, **({"y": n} if n else {})}, [0.5]) for n in range(3)]
        counts = [len(marks(axes, "o")) for axes in figure(trials).axes]
        assert counts == [3, 2]

    def test_long_names_stand_upright(self, figure: Any, make_trial: Any) -> None:
        trials = [make_trial(n, {"x": f"a_long_name_{n:02d}"}, [0.5]) for n in range(12)]
        (axes,) = figure(trials).axes
        assert axes.get_xticklabels()[0].get_rotation() == 90

    def test_says_when_there_is_nothing_to_draw(self, figure: Any, make_trial: Any) -> None:
        with pytest.raises(DataError, match="nothing to draw"):
            figure([make_trial(n, {"x": n}, [], status="waiting") for n in range(3)])
        with pytest.raises(DataError, match="nothing to draw"):
            figure([make_trial(n, {"x": 1}, [0.5]) for n in range(3)])
