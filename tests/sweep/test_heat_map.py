import itertools
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from raysl.errors import DataError
from raysl.report.figure import RED
from raysl.sweep import heat_map
from raysl.sweep.config import MetricConfig
from raysl.sweep.heat_map import HeatAxes, draw_heat_map, heat_axes
from raysl.sweep.parameter import Parameter, parameters

METRIC = MetricConfig()
T, BATCH, QUEUE = "method.temperature", "train.global_batch_size", "method.queue_length"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, instead of its file."""
    drawn: list[Figure] = []
    monkeypatch.setattr(heat_map, "save_png", lambda figure, path: drawn.append(figure))
    return drawn


def grid(make_trial: Any, **values: list[Any]) -> list[Any]:
    combinations = itertools.product(*values.values())
    return [
        make_trial(number, dict(zip(values, found, strict=True)), [0.5 + number / 100])
        for number, found in enumerate(combinations)
    ]


def axes_of(trials: list[Any], importance: dict[str, float] | None = None) -> list[str | None]:
    chosen = heat_axes(trials, parameters(trials, {}), importance or {})
    if chosen is None:
        return []
    return [chosen.x.key, chosen.y.key, chosen.panel.key if chosen.panel else None]


class TestHeatAxes:
    def test_temperature_over_batch_size_by_queue_length(self, make_trial: Any) -> None:
        values = {"optim.base_lr": [1, 2], QUEUE: [1, 2], BATCH: [1, 2], T: [1, 2]}
        trials = grid(make_trial, **values)
        assert axes_of(trials, {"optim.base_lr": 0.9, BATCH: 0.1}) == [BATCH, T, QUEUE]

    def test_else_the_two_that_matter_most_in_order_by_the_third(self, make_trial: Any) -> None:
        trials = grid(make_trial, a=[1, 2], b=[1, 2], c=[1, 2], d=[1, 2])
        assert axes_of(trials, {"d": 0.5, "b": 0.3, "c": 0.2, "a": 0.0}) == ["d", "b", "c"]
        assert axes_of(trials) == ["b", "a", "c"]

    def test_no_panels_if_most_cells_would_be_empty(self, make_trial: Any) -> None:
        trials = [make_trial(n, {"a": n, "b": n, "c": n}, [0.5]) for n in range(6)]
        assert axes_of(trials) == ["b", "a", None]

    def test_leaves_out_what_only_some_trials_have(self, make_trial: Any) -> None:
        trials = grid(make_trial, a=[1, 2], b=[1, 2])
        trials += [make_trial(9 + n, {"a": n, "b": n, "c": n}, [0.5]) for n in range(3)]
        assert axes_of(trials, {"c": 1.0}) == ["b", "a", None]

    def test_one_parameter_has_no_heat_map(self, make_trial: Any) -> None:
        assert axes_of(grid(make_trial, a=[1, 2])) == []


def texts(axes: Any) -> dict[tuple[float, float], str]:
    """Return the numbers in the cells by (column, row)."""
    return {text.get_position(): text.get_text() for text in axes.texts}


def frames(figure: Figure) -> list[tuple[int, int, int]]:
    """Return (panel, column, row) of the cells that are framed."""
    return [
        (number, round(patch.get_x() + 0.5), round(patch.get_y() + 0.5))
        for number, axes in enumerate(figure.axes)
        for patch in axes.patches
        if isinstance(patch, Rectangle) and to_hex(patch.get_edgecolor()).upper() == RED
    ]


def hatched(figure: Figure) -> list[tuple[int, int, int]]:
    return [
        (number, round(patch.get_x() + 0.5), round(patch.get_y() + 0.5))
        for number, axes in enumerate(figure.axes)
        for patch in axes.patches
        if patch.get_hatch()
    ]


def fill(axes: Any, column: int, row: int) -> str:
    (first, *_) = [
        patch
        for patch in axes.patches
        if (patch.get_x(), patch.get_y()) == (column - 0.5, row - 0.5)
    ]
    return to_hex(first.get_facecolor())


def luminance(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def drawn_axes(trials: list[Any]) -> HeatAxes:
    found = heat_axes(trials, parameters(trials, {}), {})
    assert found is not None
    return found


class TestDrawHeatMap:
    def test_each_panel_has_the_numbers_of_its_value(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = grid(make_trial, **{T: [0.1, 0.2], BATCH: [64, 128], QUEUE: [8, 16]})
        draw_heat_map(tmp_path / "a.png", trials, METRIC, drawn_axes(trials))
        (figure,) = figures
        panels = figure.axes[:2]
        assert [axes.get_title(loc="left") for axes in panels] == [
            "queue length 8",
            "queue length 16",
        ]
        # Trial by trial: queue fastest, then batch size (column), then temperature (row).
        assert texts(panels[0]) == {(0, 0): "50.0", (1, 0): "52.0", (0, 1): "54.0", (1, 1): "56.0"}
        assert texts(panels[1]) == {(0, 0): "51.0", (1, 0): "53.0", (0, 1): "55.0", (1, 1): "57.0"}
        assert frames(figure) == [(1, 1, 1)]

    def test_a_cell_is_the_mean_over_all_other_parameters(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = grid(make_trial, a=[1, 2], b=[1, 2], seed=[0, 1, 2])
        draw_heat_map(tmp_path / "a.png", trials, METRIC, drawn_axes(trials))
        assert texts(figures[0].axes[0])[0, 0] == "51.0"

    def test_finished_trials_alone_make_a_cell_that_has_any(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = grid(make_trial, a=[1, 2], b=[1, 2], seed=[0, 1])
        trials[0] = trials[0]._replace(status="stopped", metric=0.1)
        trials[6:] = [trial._replace(status="stopped", metric=0.99) for trial in trials[6:]]
        draw_heat_map(tmp_path / "a.png", trials, METRIC, drawn_axes(trials))
        (figure,) = figures
        assert texts(figure.axes[0])[0, 0] == "51.0"
        assert texts(figure.axes[0])[1, 1] == "99.0"
        assert hatched(figure) == [(0, 1, 1)]
        assert frames(figure) == [(0, 0, 1)]  # not the hatched one, which may have been stopped

    def test_a_cell_whose_trials_failed_has_a_cross_and_no_number(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = grid(make_trial, a=[1, 2], b=[1, 2])
        trials[1] = trials[1]._replace(status="failed")
        trials[2] = trials[2]._replace(status="waiting", metric=None, curve=())
        draw_heat_map(tmp_path / "a.png", trials, METRIC, drawn_axes(trials))
        axes = figures[0].axes[0]
        assert set(texts(axes)) == {(0, 0), (1, 1)}
        crosses = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "x"]
        assert crosses == [[[1, 0]]]

    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_better_cells_are_brighter_and_the_best_is_framed(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path, mode: Any
    ) -> None:
        trials = grid(make_trial, a=[1, 2], b=[1, 2, 3])
        draw_heat_map(tmp_path / "a.png", trials, MetricConfig(mode=mode), drawn_axes(trials))
        axes = figures[0].axes[0]
        by_value = [luminance(fill(axes, column, row)) for row in (0, 1) for column in (0, 1, 2)]
        assert by_value == sorted(by_value, reverse=mode == "min")
        assert frames(figures[0]) == [(0, 2, 1) if mode == "max" else (0, 0, 0)]

    def test_one_collapsed_cell_does_not_take_the_colours_of_the_others(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = grid(make_trial, a=[1, 2], b=[1, 2, 3])
        trials[0] = trials[0]._replace(metric=0.01)
        draw_heat_map(tmp_path / "a.png", trials, METRIC, drawn_axes(trials))
        axes = figures[0].axes[0]
        assert texts(axes)[0, 0] == "1.0"
        assert luminance(fill(axes, 2, 1)) - luminance(fill(axes, 1, 0)) > 80

    def test_ordered_pairs_of_labels_have_the_same_order_on_both_axes(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = grid(make_trial, first=["crop", "blur"], second=["crop", "blur"])
        draw_heat_map(tmp_path / "a.png", trials, METRIC, drawn_axes(trials))
        axes = figures[0].axes[0]
        labels = [[text.get_text() for text in ticks] for ticks in _tick_labels(axes)]
        assert labels == [["crop", "blur"], ["crop", "blur"]]
        assert texts(axes)[1, 0] == "51.0"  # crop first, then blur
        assert axes.yaxis_inverted()  # the first one on top, as in a table

    def test_bins_have_their_numbers_at_the_edges(
        self, make_trial: Any, figures: list[Figure], tmp_path: Path
    ) -> None:
        trials = grid(make_trial, a=[1, 2], b=[0.1, 1.0, 10.0, 100.0])
        x = Parameter("b", "b", edges=(0.1, 10.0, 100.0), is_log=True)
        y = Parameter("a", "a", values=(1, 2))
        draw_heat_map(tmp_path / "a.png", trials, METRIC, HeatAxes(x, y, None))
        axes = figures[0].axes[0]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "10", "100"]
        assert axes.get_xticks().tolist() == [-0.5, 0.5, 1.5]
        assert texts(axes)[0, 0] == "50.5"  # of 0.1 and 1
        assert texts(axes)[1, 0] == "52.5"  # of 10 and 100

    def test_says_when_nothing_was_measured(self, make_trial: Any, tmp_path: Path) -> None:
        trials = grid(make_trial, a=[1, 2], b=[1, 2])
        failed = [trial._replace(status="failed") for trial in trials]
        with pytest.raises(DataError, match="no trial with b and a was measured"):
            draw_heat_map(tmp_path / "a.png", failed, METRIC, drawn_axes(trials))
        assert not (tmp_path / "a.png").exists()

    def test_names_that_are_mathematics_or_unknown_letters_are_drawn(
        self, make_trial: Any, tmp_path: Path
    ) -> None:
        trials = grid(make_trial, a=["$\\bad{$", "\u732b"], b=["x" * 60, "_y"])
        draw_heat_map(tmp_path / "a.png", trials, METRIC, drawn_axes(trials))
        assert (tmp_path / "a.png").stat().st_size > 1000


def _tick_labels(axes: Any) -> Any:
    return axes.get_xticklabels(), axes.get_yticklabels()
