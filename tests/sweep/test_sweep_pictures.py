from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from raysl.errors import DataError
from raysl.report.figure import GREY, ORANGE, RED
from raysl.sweep import pictures as sweep_pictures
from raysl.sweep.config import MetricConfig
from raysl.sweep.pictures import draw_importance, draw_trial_curves

METRIC = MetricConfig()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, instead of its file."""
    drawn: list[Figure] = []
    monkeypatch.setattr(sweep_pictures, "save_png", lambda figure, path: drawn.append(figure))
    return drawn


def curves(figure: Figure) -> list[Any]:
    """Return the lines that are curves, not marks."""
    return [line for line in figure.axes[0].lines if line.get_linestyle() != "None"]


def marks(figure: Figure) -> dict[str, list[float]]:
    """Return where the marks at the ends of curves stand."""
    return {
        line.get_marker(): line.get_xydata()[0].tolist()
        for line in figure.axes[0].lines
        if line.get_linestyle() == "None"
    }


def luminance(color: Any) -> float:
    text = to_hex(color)
    red, green, blue = (int(text[i : i + 2], 16) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


class TestDrawTrialCurves:
    def test_draws_every_measured_trial_over_its_epochs(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = [make_trial(0, {}, [0.2, 0.4]), make_trial(1, {}, [0.1]), make_trial(2, {}, [])]
        draw_trial_curves(tmp_path / "a.png", trials, METRIC, best=None)
        drawn = [line.get_xydata().tolist() for line in curves(figures[0])]
        assert drawn == [[[1, 20], [2, 40]], [[1, 10]]]
        assert figures[0].legends[0].get_title().get_text() == "Nearest-neighbour accuracy, %"

    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_finished_ones_are_the_brighter_the_better_they_ended(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path, mode: Any
    ) -> None:
        trials = [make_trial(n, {}, [0.9 - n / 10, 0.2 + n / 10]) for n in range(4)]
        draw_trial_curves(tmp_path / "a.png", trials, MetricConfig(mode=mode), best=None)
        bright = [luminance(line.get_color()) for line in curves(figures[0])]
        assert bright == sorted(bright, reverse=mode == "min")
        assert max(bright) < 200  # or it could not be seen on white

    def test_how_a_trial_ended_is_seen(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = [
            make_trial(0, {}, [0.3, 0.4], status="stopped"),
            make_trial(1, {}, [0.5], status="failed"),
            make_trial(2, {}, [0.1, 0.2, 0.3]),
            make_trial(3, {}, [0.2, 0.5, 0.6]),
        ]
        draw_trial_curves(tmp_path / "a.png", trials, METRIC, best=trials[3])
        looks = [(line.get_color(), line.get_linestyle()) for line in curves(figures[0])]
        assert looks[:2] == [(GREY, "--"), (RED, ":")]
        assert looks[3] == (ORANGE, "-")
        assert marks(figures[0]) == {"o": [2, 40], "x": [1, 50], "*": [3, 60]}
        orders = [line.get_zorder() for line in curves(figures[0])]
        assert orders[3] == max(orders)
        legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
        assert legend == [
            "best: trial 3, 60.0",
            "finished (brighter: better)",
            "stopped early",
            "failed",
        ]

    def test_writes_a_picture(self, make_trial: Any, tmp_path: Path) -> None:
        path = tmp_path / "pictures" / "a.png"
        draw_trial_curves(path, [make_trial(0, {}, [0.5])], METRIC, best=None)
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_says_when_nothing_was_measured(self, make_trial: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no trial was measured"):
            draw_trial_curves(tmp_path / "a.png", [make_trial(0, {}, [])], METRIC, best=None)


class TestDrawImportance:
    def test_bars_are_as_long_as_the_shares_and_the_largest_is_on_top(
        self, figures: list[Figure], tmp_path: Path
    ) -> None:
        draw_importance(tmp_path / "a.png", {"method.temperature": 0.75, "optim.base_lr": 0.25})
        axes = figures[0].axes[0]
        assert [bar.get_width() for bar in axes.patches] == [75, 25]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["temperature", "base lr"]
        assert axes.yaxis_inverted()
        assert [text.get_text() for text in axes.texts] == ["75", "25"]

    def test_says_when_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nothing to draw"):
            draw_importance(tmp_path / "a.png", {})
