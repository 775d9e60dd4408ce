import math

import numpy as np
import pytest
from scipy import stats

from raysl.augment.crop import Image
from raysl.augment.ops import ColorJitter
from raysl.augment.photometric import (
    CutoutPlan,
    JitterPlan,
    NoisePlan,
    apply_blur,
    apply_brightness,
    apply_contrast,
    apply_cutout,
    apply_grey,
    apply_hue,
    apply_jitter,
    apply_noise,
    apply_saturation,
    apply_sobel,
    apply_solarise,
    blur_taps,
    plan_chance,
    plan_cutout,
    plan_jitter,
    plan_noise,
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
        found = apply_brightness(_cube(), value, kind="add")
        np.testing.assert_array_equal(found, np.rint(255 * exact))

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
        np.testing.assert_array_equal(apply_jitter(_noise(), plan), expected)

    def test_the_order_matters(self) -> None:
        one = JitterPlan(1.8, 0.4, 1.0, 0.0, (0, 1, 2, 3))
        other = JitterPlan(1.8, 0.4, 1.0, 0.0, (1, 0, 2, 3))
        assert (apply_jitter(_noise(), one) != apply_jitter(_noise(), other)).any()

    def test_neutral_factors_give_the_image(self) -> None:
        plan = JitterPlan(1.0, 1.0, 1.0, 0.0, (2, 3, 0, 1))
        np.testing.assert_array_equal(apply_jitter(_noise(), plan), _noise())

    def test_what_is_added_is_uniform_on_both_sides_of_zero(self) -> None:
        op = ColorJitter(brightness=0.4, brightness_kind="add", prob=1.0)
        rng = np.random.default_rng(0)
        plans = [op.plan(rng) for _ in range(DRAWS)]
        drawn = np.array([plan.brightness for plan in plans if plan is not None])
        assert stats.kstest(drawn, stats.uniform(-0.4, 0.8).cdf).pvalue > 1e-3
        assert {plan.brightness_kind for plan in plans if plan is not None} == {"add"}

    def test_the_factors_are_independent_of_each_other(self) -> None:
        rng = np.random.default_rng(0)
        plans = [
            plan_jitter(rng, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, prob=1.0)
            for _ in range(DRAWS)
        ]
        table = np.array([plan[:4] for plan in plans if plan is not None])
        correlation = np.corrcoef(table.T) - np.eye(4)
        assert np.abs(correlation).max() < 4 / math.sqrt(DRAWS)

    @pytest.mark.parametrize("prob", [0.0, 0.8, 1.0])
    def test_happens_with_the_probability_asked_for(self, prob: float) -> None:
        rng = np.random.default_rng(0)
        plans = [
            plan_jitter(rng, brightness=1, contrast=1, saturation=1, hue=0, prob=prob)
            for _ in range(DRAWS)
        ]
        share = np.mean([plan is not None for plan in plans])
        assert share == pytest.approx(prob, abs=4 * math.sqrt(prob * (1 - prob) / DRAWS))


class TestGrey:
    def test_is_the_luma_in_all_three_channels(self) -> None:
        result = apply_grey(_cube())
        assert np.abs(result - _luma(_cube())[..., None]).max() <= 0.502

    def test_twice_is_once(self) -> None:
        once = apply_grey(_noise())
        np.testing.assert_array_equal(apply_grey(once), once)


class TestBlur:
    @pytest.mark.parametrize(
        ("sigma", "kernel", "taps"),
        [(2.0, None, 13), (2.0, 5, 5), (2.0, 99, 13), (1.0, None, 7), (0.3, None, 3)],
    )
    def test_a_point_spreads_over_the_shorter_of_kernel_and_three_sigma(
        self, sigma: float, kernel: int | None, taps: int
    ) -> None:
        image = np.zeros((41, 41, 3), dtype=np.uint8)
        image[:, 20] = 255  # a line, so that even the last tap stays above half a level
        blurred = apply_blur(image, sigma, taps=blur_taps(sigma, longest=kernel))
        touched = np.flatnonzero(blurred[20, :, 0])
        assert touched.tolist() == list(range(20 - taps // 2, 21 + taps // 2))

    def test_keeps_a_flat_image_flat(self) -> None:
        image = np.full((20, 20, 3), (3, 128, 254), dtype=np.uint8)
        np.testing.assert_array_equal(apply_blur(image, 2.0, taps=13), image)

    def test_works_on_an_image_smaller_than_its_kernel(self) -> None:
        image = np.full((2, 3, 3), 90, dtype=np.uint8)
        np.testing.assert_array_equal(apply_blur(image, 5.0, taps=31), image)


class TestSolarise:
    def test_the_threshold_itself_is_inverted_and_256_inverts_nothing(self) -> None:
        image = np.array([[[127, 128, 255]]], dtype=np.uint8)
        assert apply_solarise(image).tolist() == [[[127, 127, 0]]]
        assert apply_solarise(image, threshold=256).tolist() == image.tolist()


class TestPlanChance:
    @pytest.mark.parametrize("prob", [0.0, 0.2, 1.0])
    def test_happens_with_the_probability_asked_for(self, prob: float) -> None:
        rng = np.random.default_rng(0)
        share = np.mean([plan_chance(rng, prob=prob) for _ in range(DRAWS)])
        assert share == pytest.approx(prob, abs=4 * math.sqrt(prob * (1 - prob) / DRAWS))


class TestNoise:
    def test_is_a_function_of_the_seed_and_differs_in_every_channel(self) -> None:
        grey = np.full((16, 16, 3), 128, dtype=np.uint8)
        one, same, other = (apply_noise(grey, NoisePlan(0.1, seed)) for seed in (1, 1, 2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)
        assert not np.array_equal(one[..., 0], one[..., 1])

    def test_stays_within_the_levels(self) -> None:
        white = np.full((16, 16, 3), 255, dtype=np.uint8)
        assert apply_noise(white, NoisePlan(0.1, 0)).min() > 100  # no overflow to black

    def test_strength_is_uniform_and_seeds_differ(self) -> None:
        rng = np.random.default_rng(0)
        plans = [plan_noise(rng, sigma=(0.1, 0.3), prob=0.5) for _ in range(DRAWS)]
        drawn = [plan for plan in plans if plan is not None]
        assert len(drawn) / DRAWS == pytest.approx(0.5, abs=0.03)
        assert np.mean([plan.sigma for plan in drawn]) == pytest.approx(0.2, abs=0.005)
        assert len({plan.seed for plan in drawn}) == len(drawn)


class TestSobel:
    @pytest.mark.parametrize("axis", [0, 1])
    def test_of_a_straight_edge_is_its_height_on_both_sides(self, axis: int) -> None:
        image = np.zeros((8, 8, 3), dtype=np.uint8)
        image[:, 4:] = 100
        if axis == 0:
            image = image.transpose(1, 0, 2).copy()
        found = apply_sobel(image)
        found = found.transpose(1, 0, 2) if axis == 0 else found
        assert (found[:, 3:5] == 100).all()
        assert (found[:, :3] == 0).all()
        assert (found[:, 5:] == 0).all()


class TestCutout:
    def test_by_hand(self) -> None:
        found = apply_cutout(np.zeros((10, 10, 3), np.uint8), CutoutPlan(0.5, 0.3, 0.4), fill=9)
        expected = np.zeros((10, 10, 3), np.uint8)
        expected[3:7, 1:5] = 9
        assert np.array_equal(found, expected)

    def test_is_cut_off_at_the_border(self) -> None:
        found = apply_cutout(np.zeros((10, 10, 3), np.uint8), CutoutPlan(0.0, 0.99, 0.4), fill=9)
        assert np.count_nonzero(found[..., 0]) == 2 * 2
        assert (found[:2, 8:] == 9).all()

    def test_leaves_the_image_it_was_given(self) -> None:
        image = _noise()
        before = image.copy()
        apply_cutout(image, CutoutPlan(0.5, 0.5, 0.5), fill=0)
        assert np.array_equal(image, before)

    def test_centre_and_side_are_uniform(self) -> None:
        rng = np.random.default_rng(0)
        drawn = [plan_cutout(rng, side=(0.2, 0.4), prob=1.0) for _ in range(DRAWS)]
        rows, columns, sides = np.array(drawn, dtype=float).T
        for values, low, high in ((rows, 0, 1), (columns, 0, 1), (sides, 0.2, 0.4)):
            assert values.min() >= low
            assert values.max() <= high
            assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low) * 2)
