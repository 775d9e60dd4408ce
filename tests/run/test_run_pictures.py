import math
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from raysl.augment.crop import Crop
from raysl.augment.ops import Flip
from raysl.augment.pipeline import View, make_views
from raysl.data.decode import decode
from raysl.errors import DataError
from raysl.report.figure import BLUE, DPI, GREY, ORANGE
from raysl.run.pictures import draw_accuracy, draw_views
from raysl.sources.source import ArraySource

CELL_PX = 220
WHOLE = Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0))


def read(path: Path) -> npt.NDArray[np.uint8]:
    """Return a PNG as ``(H, W, 3)`` RGB."""
    return decode(path.read_bytes(), where=path.name)


def cell(image: npt.NDArray[np.uint8], *, row: int, column: int) -> npt.NDArray[np.uint8]:
    """Return the inner part of a cell of the grid of views."""
    top = image.shape[0] % CELL_PX + row * CELL_PX
    edge = 15
    return image[top + edge : top + CELL_PX - edge, column * CELL_PX + edge :][:, : 220 - 2 * edge]


def noise(count: int, *shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


class TestDrawViews:
    def test_a_view_that_changes_nothing_looks_like_the_original(self, tmp_path: Path) -> None:
        source = ArraySource("s", noise(3, 8, 8, 3))
        draw_views(tmp_path / "a.png", source=source, views=[View(size_px=8, crop=WHOLE)], seed=0)
        image = read(tmp_path / "a.png")
        for row in range(3):
            original, view = (cell(image, row=row, column=c) for c in (0, 1))
            assert (original == view).all()

    def test_small_images_are_enlarged_without_new_colors(self, tmp_path: Path) -> None:
        pixels = noise(1, 6, 6, 3)
        draw_views(
            tmp_path / "a.png", source=ArraySource("s", pixels), views=[View(size_px=32)], seed=0
        )
        shown = cell(read(tmp_path / "a.png"), row=0, column=0).reshape(-1, 3)
        assert {*map(tuple, shown.tolist())} == {*map(tuple, pixels.reshape(-1, 3).tolist())}

    def test_views_are_those_of_epoch_0_of_the_run(self, tmp_path: Path) -> None:
        source = ArraySource("s", noise(2, 8, 8, 3))
        views = [View(size_px=4, crop=Crop(scale=(0.2, 0.5)), ops=(Flip(),), count=2)]
        draw_views(tmp_path / "a.png", source=source, views=views, seed=7)
        image = read(tmp_path / "a.png")
        for row in range(2):
            made = make_views(source.images[row], views, seed=7, epoch=0, index=row)[0]
            for number, view in enumerate(made, 1):
                shown = cell(image, row=row, column=number)
                where = (np.array([1, 3, 5, 7]) * shown.shape[0]) // 8
                assert (shown[np.ix_(where, where)] == view).all()

    def test_spreads_its_rows_over_the_source(self, tmp_path: Path) -> None:
        levels = np.repeat(np.arange(100, dtype=np.uint8), 16).reshape(100, 4, 4)
        source = ArraySource("sorted", levels)
        draw_views(tmp_path / "a.png", source=source, views=[View(size_px=4)], seed=0, num_images=4)
        image = read(tmp_path / "a.png")
        shown = [int(cell(image, row=row, column=0).mean()) for row in range(4)]
        assert shown == [0, 33, 66, 99]

    def test_has_a_row_an_image_and_a_column_a_view_within_reason(self, tmp_path: Path) -> None:
        source = ArraySource("s", noise(2, 20, 30, 3))
        views = [View(size_px=8, count=2), View(size_px=4, count=98)]
        draw_views(tmp_path / "a.png", source=source, views=views, seed=0, num_images=8)
        image = read(tmp_path / "a.png")
        assert image.shape[1] == 12 * CELL_PX
        assert image.shape[0] // CELL_PX == 2

    def test_averages_an_image_that_is_larger_than_its_place(self, tmp_path: Path) -> None:
        checks = np.indices((1000, 1000)).sum(axis=0) % 2 * 255
        source = ArraySource("s", checks.astype(np.uint8)[None])
        draw_views(tmp_path / "a.png", source=source, views=[View(size_px=8)], seed=0)
        shown = cell(read(tmp_path / "a.png"), row=0, column=0)
        assert abs(int(shown.mean()) - 127) < 5
        assert shown.std() < 20

    def test_works_in_a_thread_beside_another(self, tmp_path: Path) -> None:
        source = ArraySource("s", noise(4, 8, 8, 3))
        paths = [tmp_path / f"{n}.png" for n in range(3)]

        def draw(path: Path) -> None:
            draw_views(path, source=source, views=[View(size_px=8)], seed=0)

        threads = [threading.Thread(target=draw, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        images = [read(path) for path in paths]
        assert all((image == images[0]).all() for image in images)


def color_mask(image: npt.NDArray[np.uint8], color: str) -> npt.NDArray[np.bool_]:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    result: npt.NDArray[np.bool_] = (image == wanted).all(axis=2)
    return result


def bar_heights_px(path: Path, color: str) -> list[int]:
    """Return the height of each bar of a colour, from the left."""
    image = read(path)[DPI // 2 :]  # below the legend
    drawn = color_mask(image, color).astype(np.uint8)
    mask = cv2.morphologyEx(drawn, cv2.MORPH_OPEN, np.ones((9, 9)))  # without lines and letters
    _, _, stats, places = cv2.connectedComponentsWithStats(mask)
    bars = [(places[i][0], stats[i][cv2.CC_STAT_HEIGHT]) for i in range(1, len(stats))]
    return [int(height) for _, height in sorted(bars)]


ACCURACIES = {"knn_top1": 0.4, "linear_lbfgs_top1": 0.8, "few_shot_top1": 0.2}


class TestDrawAccuracy:
    def test_bars_begin_at_zero_and_are_as_high_as_the_accuracy(self, tmp_path: Path) -> None:
        draw_accuracy(tmp_path / "a.png", ACCURACIES)
        knn, linear, few = bar_heights_px(tmp_path / "a.png", BLUE)
        assert linear / knn == pytest.approx(2, rel=0.02)
        assert knn / few == pytest.approx(2, rel=0.04)

    def test_draws_each_of_the_three_that_was_measured(self, tmp_path: Path) -> None:
        both = ACCURACIES | {f"pixels_{name}": value for name, value in ACCURACIES.items()}
        draw_accuracy(tmp_path / "a.png", both)
        heights = {c: len(bar_heights_px(tmp_path / "a.png", c)) for c in (BLUE, ORANGE, GREY)}
        assert heights == {BLUE: 3, ORANGE: 0, GREY: 3}

    def test_one_encoder_stands_above_its_names_and_alone_in_the_legend(
        self, tmp_path: Path
    ) -> None:
        draw_accuracy(tmp_path / "a.png", {"knn_top1": 0.5})
        image = read(tmp_path / "a.png")
        for color in (ORANGE, GREY):  # no area of it, neither bar nor legend
            mask = color_mask(image, color).astype(np.uint8)
            assert not cv2.erode(mask, np.ones((5, 5))).any()
        bar = np.flatnonzero(color_mask(image[DPI // 2 :], BLUE).sum(axis=0) > 9)
        label = (image[-DPI // 3 :, 150:] < 150).all(axis=2)  # right of the numbers of the axis
        name = 150 + np.flatnonzero((label & (label.sum(axis=1) < 400)[:, None]).any(axis=0))
        assert (bar[0] + bar[-1]) / 2 == pytest.approx((name[0] + name[-1]) / 2, abs=4)

    def test_draws_the_deviation_over_draws(self, tmp_path: Path) -> None:
        def num_dark_pixels(results: dict[str, Any]) -> int:
            draw_accuracy(tmp_path / "a.png", results)
            return int((read(tmp_path / "a.png") < 60).all(axis=2).sum())

        few = {"few_shot_top1": 0.5}
        assert num_dark_pixels(few | {"few_shot_top1_std": 0.2}) > 80 + num_dark_pixels(few)

    def test_leaves_out_what_is_not_finite(self, tmp_path: Path) -> None:
        draw_accuracy(tmp_path / "a.png", {"knn_top1": math.nan, "linear_lbfgs_top1": 0.5})
        assert len(bar_heights_px(tmp_path / "a.png", BLUE)) == 1

    def test_says_when_there_is_no_accuracy(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no accuracy"):
            draw_accuracy(tmp_path / "a.png", {"steps": 10})
