import math
from typing import Any

import numpy as np
import pytest

from raysl.augment.crop import (
    Border,
    Crop,
    CropBox,
    Image,
    apply_crop,
    center_box,
    plan_crop,
    shrink_box,
)

DRAWS = 5000


def _noise(height: int, width: int) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _ours(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array(
        [plan_crop(rng, height=height, width=width, scale=scale, ratio=ratio) for _ in range(DRAWS)]
    )


class TestPlanCrop:
    @pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (7, 5), (64, 64), (100, 300)])
    def test_boxes_lie_inside_the_image(self, size: tuple[int, int]) -> None:
        height, width = size
        rng = np.random.default_rng(0)
        for _ in range(500):
            box = plan_crop(rng, height=height, width=width)
            assert box.height >= 1
            assert box.width >= 1
            assert 0 <= box.top <= height - box.height
            assert 0 <= box.left <= width - box.width

    def test_area_is_uniform_and_aspect_log_uniform_where_every_draw_fits(self) -> None:
        top, _, height, width = _ours(1000, 1000, (0.1, 0.5), (3 / 4, 4 / 3)).T
        area, aspect = height * width / 1e6, np.log(width / height) / math.log(4 / 3)
        ranks = (np.arange(DRAWS) + 0.5) / DRAWS
        # Kolmogorov-Smirnov, 0.1 % level: 1.95 / sqrt(n).
        limit = 1.95 / math.sqrt(DRAWS)
        assert np.abs((np.sort(area) - 0.1) / 0.4 - ranks).max() < limit
        assert np.abs((np.sort(aspect) + 1) / 2 - ranks).max() < limit
        assert (top / (1000 - height)).mean() == pytest.approx(0.5, abs=0.02)

    def test_scale_of_one_and_a_square_is_the_whole_square_image(self) -> None:
        box = plan_crop(
            np.random.default_rng(0), height=33, width=33, scale=(1.0, 1.0), ratio=(1.0, 1.0)
        )
        assert box == CropBox(0, 0, 33, 33)

    @pytest.mark.parametrize(
        ("size", "box"),
        [
            ((10, 100), CropBox(0, 43, 10, 13)),  # too wide: 10 * 4/3
            ((100, 12), CropBox(42, 0, 16, 12)),  # too high: 12 / (3/4)
            ((30, 30), CropBox(0, 0, 30, 30)),
            ((1, 1000), CropBox(0, 499, 1, 1)),
        ],
    )
    def test_falls_back_to_the_largest_centred_box(
        self, size: tuple[int, int], box: CropBox
    ) -> None:
        rng = np.random.default_rng(0)
        assert plan_crop(rng, height=size[0], width=size[1], attempts=0) == box

    def test_falls_back_when_no_draw_fits(self) -> None:
        rng = np.random.default_rng(0)
        box = plan_crop(rng, height=10, width=100, scale=(1.0, 1.0))
        assert box == CropBox(0, 43, 10, 13)


class TestCenterBox:
    @pytest.mark.parametrize(
        ("size", "fraction", "box"),
        [
            ((8, 8), 1.0, CropBox(0, 0, 8, 8)),
            ((8, 12), 1.0, CropBox(0, 2, 8, 8)),
            ((13, 8), 1.0, CropBox(2, 0, 8, 8)),
            ((256, 300), 0.875, CropBox(16, 38, 224, 224)),
            ((3, 3), 0.01, CropBox(1, 1, 1, 1)),
        ],
    )
    def test_by_hand(self, size: tuple[int, int], fraction: float, box: CropBox) -> None:
        assert center_box(height=size[0], width=size[1], fraction=fraction) == box


class TestApplyCrop:
    def test_a_box_of_the_wanted_size_is_cut_out_unchanged(self) -> None:
        image = _noise(20, 30)
        result = apply_crop(image, CropBox(3, 5, 8, 8), size_px=8)
        np.testing.assert_array_equal(result, image[3:11, 5:13])

    @pytest.mark.parametrize(
        "box", [CropBox(0, 0, 40, 60), CropBox(7, 9, 5, 3), CropBox(0, 0, 1, 1)]
    )
    @pytest.mark.parametrize("size_px", [1, 8, 50])
    def test_returns_a_square_of_the_wanted_size(self, box: CropBox, size_px: int) -> None:
        result = apply_crop(_noise(40, 60), box, size_px=size_px)
        assert result.shape == (size_px, size_px, 3)
        assert result.dtype == np.uint8

    def test_looks_only_at_the_box(self) -> None:
        image = _noise(40, 40)
        inside = np.zeros_like(image)
        inside[10:30, 5:35] = image[10:30, 5:35]
        box = CropBox(10, 5, 20, 30)
        for size_px in (8, 25, 64):
            np.testing.assert_array_equal(
                apply_crop(image, box, size_px=size_px), apply_crop(inside, box, size_px=size_px)
            )

    def test_shrinking_by_a_whole_factor_is_the_mean_of_each_cell(self) -> None:
        image = _noise(48, 48)
        cells = image.reshape(12, 4, 12, 4, 3).astype(float).mean(axis=(1, 3))
        result = apply_crop(image, CropBox(0, 0, 48, 48), size_px=12)
        assert np.abs(result - cells).max() <= 0.5 + 1e-9

    def test_a_checkerboard_shrinks_to_grey_without_aliasing(self) -> None:
        board = np.indices((60, 60)).sum(axis=0) % 2 * 255
        image = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
        result = apply_crop(image, CropBox(0, 0, 60, 60), size_px=10).astype(int)
        assert np.abs(result - 127.5).max() <= 1

    def test_stripes_shrink_to_grey_also_where_the_other_side_grows(self) -> None:
        stripes = np.zeros((60, 8, 3), dtype=np.uint8)
        stripes[::2] = 255
        result = apply_crop(stripes, CropBox(0, 0, 60, 8), size_px=10).astype(int)
        assert np.abs(result - 127.5).max() <= 1

    def test_keeps_a_flat_image_flat(self) -> None:
        image = np.full((37, 53, 3), (10, 200, 77), dtype=np.uint8)
        for size_px in (5, 40, 80):
            result = apply_crop(image, CropBox(1, 2, 30, 45), size_px=size_px)
            np.testing.assert_array_equal(result, np.broadcast_to(image[0, 0], result.shape))


class TestPadded:
    def test_finds_every_place_of_the_image_in_its_border(self) -> None:
        # torchvision's RandomCrop(32, padding=4): 9 x 9 places, each as likely.
        rng = np.random.default_rng(0)
        crop = Crop(short_side=(1.0, 1.0), pad=0.125)
        boxes = np.array([crop.plan(rng, height=32, width=32) for _ in range(DRAWS)])
        assert (boxes[:, 2:] == 32).all()
        for column in (0, 1):
            places, counts = np.unique(boxes[:, column], return_counts=True)
            np.testing.assert_array_equal(places, np.arange(-4, 5))
            assert np.abs(counts / DRAWS - 1 / 9).max() < 4 * math.sqrt(8 / 81 / DRAWS)

    @pytest.mark.parametrize(("border", "mode"), [("black", "constant"), ("reflect", "reflect")])
    @pytest.mark.parametrize("corner", [(-4, -3), (4, 0), (0, 4), (-1, 2)])
    def test_is_a_part_of_the_padded_image(
        self, border: Border, mode: Any, corner: tuple[int, int]
    ) -> None:
        image = _noise(32, 32)
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode=mode)
        top, left = corner
        found = apply_crop(image, CropBox(top, left, 32, 32), size_px=32, border=border)
        np.testing.assert_array_equal(found, padded[top + 4 : top + 36, left + 4 : left + 36])

    def test_of_an_image_that_is_not_square_is_a_square_of_its_shorter_side(self) -> None:
        rng, crop = np.random.default_rng(0), Crop(short_side=(1.0, 1.0), pad=0.1)
        for _ in range(200):
            box = crop.plan(rng, height=20, width=30)
            assert (box.height, box.width) == (20, 20)
            assert -2 <= box.top <= 2
            assert -2 <= box.left <= 12
            assert apply_crop(_noise(20, 30), box, size_px=16).shape == (16, 16, 3)


class TestShrinkBox:
    def test_a_box_of_a_smaller_image_covers_the_same_part(self) -> None:
        box = CropBox(top=8, left=16, height=32, width=24)
        assert shrink_box(box, 4, height=20, width=20) == CropBox(2, 4, 8, 6)

    def test_a_box_stays_inside_and_has_a_pixel(self) -> None:
        # An image of 7 pixels is one of 3 at half its size.
        assert shrink_box(CropBox(5, 0, 2, 7), 2, height=3, width=3) == CropBox(2, 0, 1, 3)
        assert shrink_box(CropBox(6, 6, 1, 1), 7, height=1, width=1) == CropBox(0, 0, 1, 1)
