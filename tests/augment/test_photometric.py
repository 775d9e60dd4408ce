import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from raysl.augment.crop import Image
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
    plan_blur,
    plan_chance,
    plan_cutout,
    plan_jitter,
    plan_noise,
)

DRAWS = 4000
FACTORS = [0.0, 0.2, 0.5, 0.9, 1.0, 1.3, 1.8]


def _noise() -> Image:
    return np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def _smooth() -> Image:
    blobs = np.random.default_rng(1).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    return cv2.resize(blobs, (48, 64), interpolation=cv2.INTER_CUBIC)  # type: ignore[return-value]


def _cube() -> Image:
    """Make an image of 32,768 colours spread evenly over the RGB cube."""
    levels = np.linspace(0, 255, 32).round().astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(128, 256, 3)


def _torchvision(op: Callable[..., Any], image: Image, *arguments: object) -> Any:
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    return op(tensor, *arguments).permute(1, 2, 0).numpy().astype(int)


def _luma(image: Image) -> np.ndarray:
    luma: np.ndarray = image.astype(float) @ np.array([0.299, 0.587, 0.114])
    return luma


class TestBrightness:
    @pytest.mark.parametrize("factor", FACTORS)
    def test_is_the_product_clamped_and_rounded(self, factor: float) -> None:
        exact = np.clip(_cube().astype(np.float32) * np.float32(factor), 0, 255)
        np.testing.assert_array_equal(apply_brightness(_cube(), factor), np.rint(exact))

    @pytest.mark.parametrize("factor", FACTORS)
    def test_is_within_one_level_of_torchvision_which_cuts_fractions_off(
        self, factor: float
    ) -> None:
        apart = apply_brightness(_cube(), factor) - _torchvision(
            tv.adjust_brightness, _cube(), factor
        )
        assert apart.min() >= 0
        assert apart.max() <= 1


class TestContrast:
    @pytest.mark.parametrize(
        "image", [_noise(), _smooth(), _cube()], ids=["noise", "smooth", "cube"]
    )
    @pytest.mark.parametrize("factor", FACTORS)
    def test_is_within_two_levels_of_torchvision(self, image: Image, factor: float) -> None:
        # Torchvision cuts fractions off twice (grey levels, result), each up to one level.
        apart = apply_contrast(image, factor) - _torchvision(tv.adjust_contrast, image, factor)
        assert np.abs(apart).max() <= (1 if factor >= 0.9 else 2)

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
    @pytest.mark.parametrize(
        "image", [_noise(), _smooth(), _cube()], ids=["noise", "smooth", "cube"]
    )
    @pytest.mark.parametrize("factor", FACTORS)
    def test_is_within_two_levels_of_torchvision(self, image: Image, factor: float) -> None:
        apart = apply_saturation(image, factor) - _torchvision(tv.adjust_saturation, image, factor)
        assert np.abs(apart).max() <= (1 if factor == 0 or factor >= 0.5 else 2)

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
    @pytest.mark.parametrize(
        "image", [_noise(), _smooth(), _cube()], ids=["noise", "smooth", "cube"]
    )
    @pytest.mark.parametrize("shift", [-0.5, -0.37, -0.1, -1 / 256, 0.02, 0.2, 1 / 3, 0.5])
    def test_is_within_seven_levels_of_torchvision(self, image: Image, shift: float) -> None:
        # 8-bit hue: half a step each way, and a step moves a channel by up to 6 levels.
        apart = np.abs(apply_hue(image, shift) - _torchvision(tv.adjust_hue, image, shift))
        assert apart.max() <= 7
        assert apart.mean() <= 0.4

    def test_does_not_drift_to_one_side(self) -> None:
        # OpenCV's hue has 256 levels a turn on the way there and 255 on the way back.
        turn = np.linspace(0, 6, 1536, endpoint=False)
        pure = 255 * np.clip(2 - np.abs((turn[:, None] - (2, 4, 6) + 1) % 6 - 3), 0, 1)
        image = pure.round().astype(np.uint8)[None]
        for shift in (-0.3, 0.15, 0.4):
            turned = apply_hue(image, shift)[0].astype(float)
            expected = _torchvision(tv.adjust_hue, image, shift)[0]
            complex_hue = np.exp(2j * np.pi * np.arange(3) / 3)
            drift = np.angle((turned @ complex_hue) / (expected @ complex_hue), deg=True)
            assert abs(drift.mean()) < 0.1
            assert np.abs(drift).max() < 2.1  # a step is 1.4 degrees

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

    @pytest.mark.parametrize(
        ("strength", "low", "high"),
        [(0.0, 1.0, 1.0), (0.4, 0.6, 1.4), (0.8, 0.2, 1.8), (1.5, 0, 2.5)],
    )
    @pytest.mark.parametrize("factor", ["brightness", "contrast", "saturation"])
    def test_factors_are_uniform_round_one_and_not_negative(
        self, factor: str, strength: float, low: float, high: float
    ) -> None:
        rng = np.random.default_rng(0)
        strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, factor: strength}
        plans = [plan_jitter(rng, **strengths, hue=0.0, prob=1.0) for _ in range(DRAWS)]
        drawn = np.sort([getattr(plan, factor) for plan in plans])
        ranks = low + (high - low) * (np.arange(DRAWS) + 0.5) / DRAWS
        assert np.abs(drawn - ranks).max() <= (high - low) * 1.95 / math.sqrt(DRAWS)
        assert drawn[0] >= low
        assert drawn[-1] <= high

    def test_hue_is_uniform_both_ways_and_independent_of_the_others(self) -> None:
        rng = np.random.default_rng(0)
        plans = [
            plan_jitter(rng, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, prob=1.0)
            for _ in range(DRAWS)
        ]
        table = np.array([plan[:4] for plan in plans if plan is not None])
        ranks = -0.2 + 0.4 * (np.arange(DRAWS) + 0.5) / DRAWS
        assert np.abs(np.sort(table[:, 3]) - ranks).max() <= 0.4 * 1.95 / math.sqrt(DRAWS)
        correlation = np.corrcoef(table.T) - np.eye(4)
        assert np.abs(correlation).max() < 4 / math.sqrt(DRAWS)

    def test_every_order_is_as_likely(self) -> None:
        rng = np.random.default_rng(0)
        plans = [
            plan_jitter(rng, brightness=1, contrast=1, saturation=1, hue=0, prob=1.0)
            for _ in range(DRAWS)
        ]
        orders = [plan.order for plan in plans if plan is not None]
        counts = [orders.count(order) for order in set(orders)]
        assert len(counts) == math.factorial(4)
        expected = DRAWS / 24
        assert max(abs(count - expected) for count in counts) < 4 * math.sqrt(expected)

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

    def test_is_within_one_level_of_torchvision_which_cuts_fractions_off(self) -> None:
        apart = apply_grey(_cube()) - _torchvision(tv.rgb_to_grayscale, _cube(), 3)
        assert apart.min() >= 0
        assert apart.max() <= 1

    def test_twice_is_once(self) -> None:
        once = apply_grey(_noise())
        np.testing.assert_array_equal(apply_grey(once), once)


class TestBlur:
    @pytest.mark.parametrize("image", [_noise(), _smooth()], ids=["noise", "smooth"])
    @pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
    def test_is_within_one_level_of_torchvision_with_a_long_kernel(
        self, image: Image, sigma: float
    ) -> None:
        theirs = _torchvision(tv.gaussian_blur, image, [31, 31], [sigma, sigma])
        assert np.abs(apply_blur(image, sigma) - theirs).max() <= 1

    @pytest.mark.parametrize("kernel", [3, 5, 9])
    def test_is_within_one_level_of_torchvision_with_the_kernel_cut(self, kernel: int) -> None:
        theirs = _torchvision(tv.gaussian_blur, _noise(), [kernel, kernel], [2.0, 2.0])
        assert np.abs(apply_blur(_noise(), 2.0, kernel_px=kernel) - theirs).max() <= 1

    @pytest.mark.parametrize(
        ("sigma", "kernel", "taps"),
        [(2.0, None, 13), (2.0, 5, 5), (2.0, 99, 13), (1.0, None, 7), (0.3, None, 3)],
    )
    def test_a_point_spreads_over_the_shorter_of_kernel_and_three_sigma(
        self, sigma: float, kernel: int | None, taps: int
    ) -> None:
        image = np.zeros((41, 41, 3), dtype=np.uint8)
        image[:, 20] = 255  # a line, so that even the last tap stays above half a level
        touched = np.flatnonzero(apply_blur(image, sigma, kernel_px=kernel)[20, :, 0])
        assert touched.tolist() == list(range(20 - taps // 2, 21 + taps // 2))

    def test_keeps_a_flat_image_flat(self) -> None:
        image = np.full((20, 20, 3), (3, 128, 254), dtype=np.uint8)
        np.testing.assert_array_equal(apply_blur(image, 2.0), image)

    def test_works_on_an_image_smaller_than_its_kernel(self) -> None:
        image = np.full((2, 3, 3), 90, dtype=np.uint8)
        np.testing.assert_array_equal(apply_blur(image, 5.0), image)

    def test_sigma_is_uniform_and_happens_with_the_probability_asked_for(self) -> None:
        rng = np.random.default_rng(0)
        plans = [plan_blur(rng, sigma_px=(0.1, 2.0), prob=0.5) for _ in range(2 * DRAWS)]
        drawn = np.sort([sigma for sigma in plans if sigma is not None])
        assert len(drawn) / len(plans) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(plans)))
        ranks = 0.1 + 1.9 * (np.arange(len(drawn)) + 0.5) / len(drawn)
        assert np.abs(drawn - ranks).max() <= 1.9 * 1.95 / math.sqrt(len(drawn))


class TestSolarise:
    @pytest.mark.parametrize("threshold", [0, 1, 128, 255])
    def test_equals_torchvision(self, threshold: int) -> None:
        theirs = _torchvision(tv.solarize, _cube(), threshold)
        np.testing.assert_array_equal(apply_solarise(_cube(), threshold=threshold), theirs)

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
    def test_has_the_deviation_asked_for_and_no_bias(self) -> None:
        grey = np.full((96, 96, 3), 128, dtype=np.uint8)
        apart = apply_noise(grey, NoisePlan(sigma=0.05, seed=3)).astype(float) - 128
        assert apart.std() == pytest.approx(0.05 * 255, rel=0.03)
        assert abs(apart.mean()) < 0.3

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

    def test_is_the_gradient_of_the_luma_by_hand(self) -> None:
        image = _noise()
        luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float)
        across = luma[:, 2:] - luma[:, :-2]
        across = across[:-2] + 2 * across[1:-1] + across[2:]
        down = luma[2:] - luma[:-2]
        down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
        expected = np.minimum(np.hypot(across, down) / 4, 255)
        assert np.abs(apply_sobel(image)[1:-1, 1:-1, 0] - expected).max() <= 0.51


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
