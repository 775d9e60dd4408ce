import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysl.data.decode import decode
from raysl.errors import DataError
from raysl.report.curves import draw_curves
from raysl.report.figure import DPI, ORANGE, RED

NAN = math.nan


def num_pixels(path: Path, color: str) -> int:
    """Count the pixels that have exactly this ``#RRGGBB``."""
    image = decode(path.read_bytes(), where=path.name)
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == wanted).all(axis=2).sum())


def height_in(path: Path) -> float:
    return float(decode(path.read_bytes(), where=path.name).shape[0] / DPI)


def losses(values: list[float], **more: float) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "train/loss": v, **more} for i, v in enumerate(values, 1)]


class TestDrawCurves:
    def test_draws_a_panel_for_each_metric_that_has_numbers_and_no_other(
        self, tmp_path: Path
    ) -> None:
        one, two, three = (tmp_path / f"{n}.png" for n in "123")
        draw_curves(one, losses([3.0, 2.0], **{"train/lr": NAN, "final/knn_top1": 0.5}))
        draw_curves(two, losses([3.0, 2.0], **{"train/lr": 0.1}))
        draw_curves(three, losses([3.0, 2.0], **{"train/lr": 0.1, "foo/new_metric": 1.0}))
        assert height_in(one) == pytest.approx(height_in(two), abs=0.02)
        assert height_in(three) - height_in(two) == pytest.approx(1.75, abs=0.02)

    def test_marks_values_that_are_not_finite(self, tmp_path: Path) -> None:
        good, bad = tmp_path / "good.png", tmp_path / "bad.png"
        draw_curves(good, losses([3.0, 2.0, 1.0]))
        draw_curves(bad, losses([3.0, math.inf, NAN]))
        assert num_pixels(good, RED) == 0
        assert num_pixels(bad, RED) > 50

    def test_draws_sparse_accuracies_between_losses(self, tmp_path: Path) -> None:
        records = [*losses([3.0] * 5), {"step": 30, "eval/knn_top1": 0.5}, {"step": 31, "time": 1}]
        path = tmp_path / "a.png"
        draw_curves(path, [{"step": 1, "time/first_step_at": 9e9}, *records])
        assert num_pixels(path, ORANGE) > 20

    def test_draws_the_measures_without_labels_whenever_they_came(self, tmp_path: Path) -> None:
        late = [{"step": step, "eval/rankme": float(step)} for step in (1, 3)]
        paths = tmp_path / "late.png", tmp_path / "in_time.png"
        draw_curves(paths[0], [*losses([3.0] * 5), *late])
        draw_curves(paths[1], sorted([*late, *losses([3.0] * 5)], key=lambda r: r["step"]))
        assert num_pixels(paths[0], ORANGE) == num_pixels(paths[1], ORANGE) > 20

    def test_draws_what_untrained_and_pixels_reach_beside_the_curve(self, tmp_path: Path) -> None:
        without, with_lines = tmp_path / "a.png", tmp_path / "b.png"
        records = [{"step": s, "eval/knn_top1": 0.5 + s / 10} for s in (1, 2)]
        draw_curves(without, records)
        final = {"final/untrained_knn_top1": 0.3, "final/pixels_knn_top1": 0.4}
        draw_curves(with_lines, [*records, {"step": 2, **final}])
        grey = "#7A7A7A"
        assert num_pixels(with_lines, grey) > num_pixels(without, grey) + 200

    def test_long_noisy_runs_are_drawn_with_a_running_mean(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).normal(size=500).tolist()
        path = tmp_path / "a.png"
        draw_curves(path, losses(noise))
        assert num_pixels(path, "#0072B2") > 500

    @pytest.mark.parametrize("records", [[], [{"step": 1, "time": 1.0}], losses([NAN])])
    def test_says_when_there_is_nothing_to_draw(
        self, tmp_path: Path, records: list[dict[str, Any]]
    ) -> None:
        with pytest.raises(DataError, match="no finite number"):
            draw_curves(tmp_path / "a.png", records)
        assert not (tmp_path / "a.png").exists()
