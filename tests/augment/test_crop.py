import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from raysl.augment.crop import (
    PLANNED_SIDE_PX,
    Border,
    CropBox,
    Image,
    apply_crop,
    apply_flip,
    apply_quarter_turn,
    apply_rotation,
    center_box,
    part_box,
    plan_crop,
    plan_flip,
    plan_padded,
    plan_part,
    plan_quarter_turn,
    plan_rotation,
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
        draw = partial(plan_padded, rng, height=32, width=32, short_side=(1.0, 1.0), pad=0.125)
        boxes = np.array([draw() for _ in range(DRAWS)])
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
        rng = np.random.default_rng(0)
        for _ in range(200):
            box = plan_padded(rng, height=20, width=30, short_side=(1.0, 1.0), pad=0.1)
            assert (box.height, box.width) == (20, 20)
            assert -2 <= box.top <= 2
            assert -2 <= box.left <= 12
            assert apply_crop(_noise(20, 30), box, size_px=16).shape == (16, 16, 3)


class TestPart:
    def test_a_box_of_a_smaller_image_covers_the_same_part(self) -> None:
        box = CropBox(top=8, left=16, height=32, width=24)
        assert shrink_box(box, 4, height=20, width=20) == CropBox(2, 4, 8, 6)

    def test_a_box_stays_inside_and_has_a_pixel(self) -> None:
        # An image of 7 pixels is one of 3 at half its size.
        assert shrink_box(CropBox(5, 0, 2, 7), 2, height=3, width=3) == CropBox(2, 0, 1, 3)
        assert shrink_box(CropBox(6, 6, 1, 1), 7, height=1, width=1) == CropBox(0, 0, 1, 1)

    def test_is_the_same_part_of_a_view_of_any_size(self) -> None:
        quarter = PLANNED_SIDE_PX // 4
        part = CropBox(quarter, 2 * quarter, 3 * quarter, quarter)
        assert part_box(part, size_px=32) == CropBox(8, 16, 24, 8)
        assert part_box(part, size_px=224) == CropBox(56, 112, 168, 56)

    @pytest.mark.parametrize("size_px", [1, 2, 7, 32])
    def test_lies_inside_the_view(self, size_px: int) -> None:
        rng = np.random.default_rng(0)
        for _ in range(500):
            part = plan_part(rng, scale=(0.001, 1.0), ratio=(0.2, 5.0), prob=1.0)
            assert part is not None
            box = part_box(part, size_px=size_px)
            assert min(box.top, box.left) >= 0
            assert min(box.height, box.width) >= 1
            assert max(box.top + box.height, box.left + box.width) <= size_px

    def test_has_an_area_even_in_its_range_and_happens_with_its_probability(self) -> None:
        rng = np.random.default_rng(0)
        drawn = [plan_part(rng, scale=(0.2, 0.6), ratio=(1, 1), prob=0.5) for _ in range(DRAWS)]
        parts = [part for part in drawn if part is not None]
        assert len(parts) / DRAWS == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(DRAWS))
        areas = np.array([part.height * part.width for part in parts]) / PLANNED_SIDE_PX**2
        assert areas.min() >= 0.2 - 1e-4
        assert areas.max() <= 0.6 + 1e-4
        assert areas.mean() == pytest.approx(0.4, abs=0.01)


class TestFlip:
    def test_mirrors_left_to_right(self) -> None:
        image = _noise(4, 7)
        np.testing.assert_array_equal(apply_flip(image), image[:, ::-1])

    def test_twice_is_the_image(self) -> None:
        image = _noise(4, 7)
        np.testing.assert_array_equal(apply_flip(apply_flip(image)), image)

    @pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
    def test_happens_with_the_probability_asked_for(self, prob: float) -> None:
        rng = np.random.default_rng(0)
        share = np.mean([plan_flip(rng, prob=prob) for _ in range(DRAWS)])
        assert share == pytest.approx(prob, abs=4 * math.sqrt(prob * (1 - prob) / DRAWS))


class TestRotation:
    @pytest.mark.parametrize("size", [(16, 16), (9, 14)])
    def test_by_nothing_is_the_image(self, size: tuple[int, int]) -> None:
        image = _noise(*size)
        np.testing.assert_array_equal(apply_rotation(image, 0.0), image)

    @pytest.mark.parametrize("side", [8, 9])
    @pytest.mark.parametrize(("angle", "turns"), [(90.0, 1), (180.0, 2), (-90.0, 3)])
    def test_by_right_angles_is_rot90_counter_clockwise(
        self, side: int, angle: float, turns: int
    ) -> None:
        image = _noise(side, side)
        np.testing.assert_array_equal(apply_rotation(image, angle), np.rot90(image, turns))

    def test_keeps_the_shape_of_an_image_that_is_not_square(self) -> None:
        assert apply_rotation(_noise(9, 14), 33.0).shape == (9, 14, 3)

    def test_repeats_the_border_and_leaves_no_black_wedge(self) -> None:
        image = np.full((20, 20, 3), 200, dtype=np.uint8)
        np.testing.assert_array_equal(apply_rotation(image, 30.0), image)

    def test_of_a_wide_image_by_90_degrees_shows_the_repeated_border(self) -> None:
        image = np.zeros((3, 9, 3), dtype=np.uint8)
        image[0], image[1], image[2] = 10, 20, 30
        # The three rows become the three middle columns; what lies beyond repeats them.
        expected = np.array([10] * 4 + [20] + [30] * 4)
        result = apply_rotation(image, 90.0)[..., 0]
        np.testing.assert_array_equal(result, np.tile(expected, (3, 1)))

    def test_happens_with_the_probability_asked_for(self) -> None:
        rng = np.random.default_rng(0)
        drawn = [plan_rotation(rng, max_deg=15.0, prob=0.25) for _ in range(DRAWS)]
        share = np.mean([angle is not None for angle in drawn])
        assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / DRAWS))


class TestQuarterTurn:
    def test_is_rot90_counter_clockwise(self) -> None:
        image = _noise(6, 6)
        for turns in (1, 2, 3):
            found = apply_quarter_turn(image, turns)
            np.testing.assert_array_equal(found, np.rot90(image, turns))
            assert found.flags.c_contiguous

    def test_each_turn_is_as_likely(self) -> None:
        rng = np.random.default_rng(0)
        drawn = [plan_quarter_turn(rng, prob=0.75) for _ in range(4000)]
        for turns in (None, 1, 2, 3):
            assert drawn.count(turns) / len(drawn) == pytest.approx(0.25, abs=0.03)
