import numpy as np
import pytest

from raysl.augment.crop import CropBox, Image
from raysl.augment.geometric import (
    PLANNED_SIDE_PX,
    CropPart,
    Cutout,
    CutoutPlan,
    Flip,
    QuarterTurn,
    Rotate,
)

DRAWS = 5000


def _noise(height: int, width: int) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestCropPart:
    def test_is_the_same_part_of_a_view_of_any_size(self) -> None:
        quarter = PLANNED_SIDE_PX // 4
        part = CropBox(quarter, 2 * quarter, 3 * quarter, quarter)
        assert CropPart().scaled(part, 32) == CropBox(8, 16, 24, 8)
        assert CropPart().scaled(part, 224) == CropBox(56, 112, 168, 56)

    @pytest.mark.parametrize("size_px", [1, 2, 7, 32])
    def test_lies_inside_the_view(self, size_px: int) -> None:
        rng, op = np.random.default_rng(0), CropPart(scale=(0.001, 1.0), ratio=(0.2, 5.0))
        for _ in range(500):
            box = op.scaled(op.draw(rng), size_px)
            assert min(box.top, box.left) >= 0
            assert min(box.height, box.width) >= 1
            assert max(box.top + box.height, box.left + box.width) <= size_px

    def test_has_an_area_uniform_in_its_range(self) -> None:
        rng, op = np.random.default_rng(0), CropPart(scale=(0.2, 0.6), ratio=(1.0, 1.0))
        parts = [op.draw(rng) for _ in range(DRAWS)]
        areas = np.array([part.height * part.width for part in parts]) / PLANNED_SIDE_PX**2
        assert areas.min() >= 0.2 - 1e-4
        assert areas.max() <= 0.6 + 1e-4
        assert areas.mean() == pytest.approx(0.4, abs=0.01)


class TestFlip:
    def test_mirrors_left_to_right(self) -> None:
        image = _noise(4, 7)
        np.testing.assert_array_equal(Flip().apply(image, True), image[:, ::-1])

    def test_twice_is_the_image(self) -> None:
        image = _noise(4, 7)
        np.testing.assert_array_equal(Flip().apply(Flip().apply(image, True), True), image)


class TestRotate:
    @pytest.mark.parametrize("size", [(16, 16), (9, 14)])
    def test_by_zero_degrees_is_the_image(self, size: tuple[int, int]) -> None:
        image = _noise(*size)
        np.testing.assert_array_equal(Rotate().apply(image, 0.0), image)

    @pytest.mark.parametrize("side", [8, 9])
    @pytest.mark.parametrize(("angle", "turns"), [(90.0, 1), (180.0, 2), (-90.0, 3)])
    def test_by_right_angles_is_rot90_counter_clockwise(
        self, side: int, angle: float, turns: int
    ) -> None:
        image = _noise(side, side)
        np.testing.assert_array_equal(Rotate().apply(image, angle), np.rot90(image, turns))

    def test_keeps_the_shape_of_an_image_that_is_not_square(self) -> None:
        assert Rotate().apply(_noise(9, 14), 33.0).shape == (9, 14, 3)

    def test_repeats_the_border_and_leaves_no_black_wedge(self) -> None:
        image = np.full((20, 20, 3), 200, dtype=np.uint8)
        np.testing.assert_array_equal(Rotate().apply(image, 30.0), image)

    def test_of_a_wide_image_by_90_degrees_shows_the_repeated_border(self) -> None:
        image = np.zeros((3, 9, 3), dtype=np.uint8)
        image[0], image[1], image[2] = 10, 20, 30
        # The three rows become the three middle columns; the columns beyond repeat them.
        expected = np.array([10] * 4 + [20] + [30] * 4)
        result = Rotate().apply(image, 90.0)[..., 0]
        np.testing.assert_array_equal(result, np.tile(expected, (3, 1)))


class TestQuarterTurn:
    @pytest.mark.parametrize("turns", [1, 2, 3])
    def test_is_rot90_counter_clockwise(self, turns: int) -> None:
        image = _noise(6, 6)
        result = QuarterTurn().apply(image, turns)
        np.testing.assert_array_equal(result, np.rot90(image, turns))
        assert result.flags.c_contiguous

    def test_each_turn_is_as_likely(self) -> None:
        rng, op = np.random.default_rng(0), QuarterTurn(prob=0.75)
        plans = [op.plan(rng) for _ in range(4000)]
        for turns in (None, 1, 2, 3):
            assert plans.count(turns) / len(plans) == pytest.approx(0.25, abs=0.03)


class TestCutout:
    def test_by_hand(self) -> None:
        result = Cutout(fill=9).apply(np.zeros((10, 10, 3), np.uint8), CutoutPlan(0.5, 0.3, 0.4))
        expected = np.zeros((10, 10, 3), np.uint8)
        expected[3:7, 1:5] = 9
        assert np.array_equal(result, expected)

    def test_is_cut_off_at_the_border(self) -> None:
        result = Cutout(fill=9).apply(np.zeros((10, 10, 3), np.uint8), CutoutPlan(0.0, 0.99, 0.4))
        assert np.count_nonzero(result[..., 0]) == 2 * 2
        assert (result[:2, 8:] == 9).all()

    def test_centre_and_side_are_uniform(self) -> None:
        rng, op = np.random.default_rng(0), Cutout(side=(0.2, 0.4))
        rows, columns, sides = np.array([op.draw(rng) for _ in range(DRAWS)]).T
        for values, low, high in ((rows, 0, 1), (columns, 0, 1), (sides, 0.2, 0.4)):
            assert values.min() >= low
            assert values.max() <= high
            assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low) * 2)

    @pytest.mark.parametrize("size", [(32, 32), (33, 33), (24, 40)])
    def test_fills_the_pixels_whose_centre_lies_in_the_square(self, size: tuple[int, int]) -> None:
        height, width = size
        image, rng = _noise(height, width), np.random.default_rng(0)
        op = Cutout(side=(0.1, 0.9), fill=7)
        for _ in range(20):
            plan = op.draw(rng)
            half = plan.side * min(height, width) / 2
            expected = image.copy()
            for row in range(height):
                for column in range(width):
                    away = (row + 0.5 - plan.row * height, column + 0.5 - plan.column * width)
                    if max(map(abs, away)) < half:
                        expected[row, column] = 7
            np.testing.assert_array_equal(op.apply(image, plan), expected)
