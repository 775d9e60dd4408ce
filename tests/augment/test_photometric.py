import math

import numpy as np
import pytest
from scipy import stats

from raysl.augment.crop import Image
from raysl.augment.photometric import (
    ColorJitter,
    Grey,
    JitterPlan,
    Solarise,
    add_brightness,
    apply_brightness,
    apply_contrast,
    apply_hue,
    apply_saturation,
)

DRAWS = 4000
FACTORS = [0.0, 0.2, 0.5, 0.9, 1.0, 1.3, 1.8]


def _noise() -> Image:
    return np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def _cube() -> Image:
    """Make an image of 32,768 colours spread evenly over the RGB cube."""
    levels = np.linspace(0, 255, 32).round().astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(128, 256, 3)


def _luma(image: Image) -> np.ndarray:
    luma: np.ndarray = image.astype(float) @ np.array([0.299, 0.587, 0.114])
    return luma


class TestBrightness:
    @pytest.mark.parametrize("factor", FACTORS)
    def test_is_the_product_clamped_and_rounded(self, factor: float) -> None:
        exact = np.clip(_cube().astype(np.float32) * np.float32(factor), 0, 255)
        np.testing.assert_array_equal(apply_brightness(_cube(), factor), np.rint(exact))

    @pytest.mark.parametrize("value", [-0.4, -0.11, 0.0, 0.03, 0.4])
    def test_that_is_added_is_the_authors_formula(self, value: float) -> None:
        # deepmind-research, byol/utils/augmentations.py:239: x + delta, clipped to [0, 1].
        exact = np.clip(_cube() / 255 + value, 0, 1)
        np.testing.assert_array_equal(add_brightness(_cube(), value), np.rint(255 * exact))

    def test_that_is_added_leaves_the_contrast_as_it_is_and_one_that_multiplies_does_not(
        self,
    ) -> None:
        image = np.random.default_rng(0).integers(110, 146, (64, 48, 3), dtype=np.uint8)
        rng, spread = np.random.default_rng(0), {}
        for kind in ("add", "multiply"):
            op = ColorJitter(
                brightness=0.4, brightness_kind=kind, contrast=0, saturation=0, hue=0, prob=1
            )
            ratios = [op.apply(image, op.plan(rng)).std() / image.std() for _ in range(400)]
            spread[kind] = np.std(ratios)
        assert spread["add"] < 0.01
        assert spread["multiply"] == pytest.approx(0.4 / math.sqrt(3), rel=0.06)


class TestContrast:
    @pytest.mark.parametrize("factor", FACTORS)
    def test_is_the_blend_with_the_mean_grey_level(self, factor: float) -> None:
        image = _noise()
        mean = _luma(image).mean()
        exact = np.clip(image * factor + mean * (1 - factor), 0, 255)
        # Half a level for the rounded mean, half for the result.
        assert np.abs(apply_contrast(image, factor) - exact).max() <= 0.5 * abs(1 - factor) + 0.501

    def test_of_zero_is_flat(self) -> None:
        result = apply_contrast(_noise(), 0.0)
        assert (result == round(_luma(_noise()).mean())).all()


class TestSaturation:
    @pytest.mark.parametrize("factor", FACTORS)
    def test_is_the_blend_with_the_grey_image_to_three_quarters_of_a_level(
        self, factor: float
    ) -> None:
        exact = _cube() * factor + _luma(_cube())[..., None] * (1 - factor)
        assert np.abs(apply_saturation(_cube(), factor) - np.clip(exact, 0, 255)).max() <= 0.75

    def test_leaves_a_grey_image_alone(self) -> None:
        grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        for factor in FACTORS:
            np.testing.assert_array_equal(apply_saturation(grey, factor), grey)


class TestHue:
    def test_by_a_third_turns_red_to_green_to_blue(self) -> None:
        red = np.full((1, 1, 3), (240, 0, 0), dtype=np.uint8)
        green = apply_hue(red, 1 / 3)
        blue = apply_hue(green, 1 / 3)
        assert np.abs(green[0, 0].astype(int) - (0, 240, 0)).max() <= 3
        assert np.abs(blue[0, 0].astype(int) - (0, 0, 240)).max() <= 6

    def test_by_nothing_is_the_image(self) -> None:
        np.testing.assert_array_equal(apply_hue(_noise(), 0.0), _noise())

    def test_by_half_a_turn_is_the_same_both_ways(self) -> None:
        np.testing.assert_array_equal(apply_hue(_noise(), 0.5), apply_hue(_noise(), -0.5))

    def test_leaves_a_grey_image_alone(self) -> None:
        grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        for shift in (-0.4, 0.1, 0.5):
            np.testing.assert_array_equal(apply_hue(grey, shift), grey)


class TestJitter:
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
    def test_is_the_composition_of_its_steps_in_the_planned_order(
        self, order: tuple[int, ...]
    ) -> None:
        steps = {
            0: lambda x: apply_brightness(x, 1.4),
            1: lambda x: apply_contrast(x, 0.6),
            2: lambda x: apply_saturation(x, 1.7),
            3: lambda x: apply_hue(x, 0.15),
        }
        expected = _noise()
        for number in order:
            expected = steps[number](expected)
        plan = JitterPlan(brightness=1.4, contrast=0.6, saturation=1.7, hue=0.15, order=order)
        np.testing.assert_array_equal(ColorJitter().apply(_noise(), plan), expected)

    def test_the_order_matters(self) -> None:
        one = JitterPlan(1.8, 0.4, 1.0, 0.0, (0, 1, 2, 3))
        other = JitterPlan(1.8, 0.4, 1.0, 0.0, (1, 0, 2, 3))
        op = ColorJitter()
        assert (op.apply(_noise(), one) != op.apply(_noise(), other)).any()

    def test_neutral_factors_give_the_image(self) -> None:
        plan = JitterPlan(1.0, 1.0, 1.0, 0.0, (2, 3, 0, 1))
        np.testing.assert_array_equal(ColorJitter().apply(_noise(), plan), _noise())

    def test_what_is_added_is_uniform_on_both_sides_of_zero(self) -> None:
        rng, op = np.random.default_rng(0), ColorJitter(brightness=0.4, brightness_kind="add")
        drawn = np.array([op.draw(rng).brightness for _ in range(DRAWS)])
        assert stats.kstest(drawn, stats.uniform(-0.4, 0.8).cdf).pvalue > 1e-3

    def test_the_factors_are_independent_of_each_other(self) -> None:
        rng, op = np.random.default_rng(0), ColorJitter()
        table = np.array([op.draw(rng)[:4] for _ in range(DRAWS)])
        correlation = np.corrcoef(table.T) - np.eye(4)
        assert np.abs(correlation).max() < 4 / math.sqrt(DRAWS)


class TestGrey:
    def test_is_the_luma_in_all_three_channels(self) -> None:
        result = Grey().apply(_cube(), True)
        assert np.abs(result - _luma(_cube())[..., None]).max() <= 0.502

    def test_twice_is_once(self) -> None:
        once = Grey().apply(_noise(), True)
        np.testing.assert_array_equal(Grey().apply(once, True), once)


class TestSolarise:
    def test_the_threshold_itself_is_inverted_and_256_inverts_nothing(self) -> None:
        image = np.array([[[127, 128, 255]]], dtype=np.uint8)
        assert Solarise(threshold=128).apply(image, True).tolist() == [[[127, 127, 0]]]
        assert Solarise(threshold=256).apply(image, True).tolist() == image.tolist()
