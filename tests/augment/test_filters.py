import numpy as np
import pytest
from scipy import ndimage

from raysl.augment.filters import Blur, Noise, NoisePlan, Sobel
from raysl.augment.photometric import Grey

DRAWS = 4000


class TestBlur:
    @pytest.mark.parametrize(
        ("side", "sigma_px", "fraction", "taps"),
        [
            # Three standard deviations to either side,
            (41, 2.0, None, 13),
            (41, 1.0, None, 7),
            (41, 0.3, None, 3),
            (41, 2.0, 1.0, 13),
            # or a fraction of the side, if this is shorter: an odd number, 3 at least.
            (41, 2.0, 0.125, 5),
            (96, 20.0, 0.1, 9),
            (224, 20.0, 0.1, 23),
            (32, 20.0, 0.1, 3),
            (8, 20.0, 0.1, 3),
        ],
    )
    def test_a_line_spreads_over_the_shorter_of_kernel_and_three_sigma(
        self, side: int, sigma_px: float, fraction: float | None, taps: int
    ) -> None:
        image = np.zeros((side, side, 3), dtype=np.uint8)
        image[:, side // 2] = 255
        blurred = Blur(kernel_fraction=fraction).apply(image, sigma_px)
        touched = np.flatnonzero(blurred[side // 2, :, 0]) - side // 2
        assert touched.tolist() == list(range(-(taps // 2), taps // 2 + 1))

    def test_keeps_a_flat_image_flat(self) -> None:
        image = np.full((20, 20, 3), (3, 128, 254), dtype=np.uint8)
        np.testing.assert_array_equal(Blur(kernel_fraction=None).apply(image, 2.0), image)

    def test_works_on_an_image_smaller_than_its_kernel(self) -> None:
        image = np.full((2, 3, 3), 90, dtype=np.uint8)
        np.testing.assert_array_equal(Blur(kernel_fraction=None).apply(image, 5.0), image)


class TestSobel:
    @pytest.mark.parametrize("axis", [0, 1])
    def test_of_a_straight_edge_is_its_height_on_both_sides(self, axis: int) -> None:
        image = np.zeros((8, 8, 3), dtype=np.uint8)
        image[:, 4:] = 100
        if axis == 0:
            image = image.transpose(1, 0, 2).copy()
        result = Sobel().apply(image, True)
        result = result.transpose(1, 0, 2) if axis == 0 else result
        assert (result[:, 3:5] == 100).all()
        assert (result[:, :3] == 0).all()
        assert (result[:, 5:] == 0).all()

    def test_is_the_rounded_magnitude_to_the_bit(self) -> None:
        image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        luma = Grey().apply(image, True)[..., 0].astype(float)
        down, across = (ndimage.sobel(luma, axis, mode="nearest") for axis in (0, 1))
        expected = np.minimum(np.rint(np.hypot(across, down) / 4), 255)
        np.testing.assert_array_equal(Sobel().apply(image, True)[..., 0], expected)


class TestNoise:
    def test_is_a_function_of_the_seed_and_differs_in_every_channel(self) -> None:
        grey = np.full((16, 16, 3), 128, dtype=np.uint8)
        one, same, other = (Noise().apply(grey, NoisePlan(0.1, seed)) for seed in (1, 1, 2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)
        assert not np.array_equal(one[..., 0], one[..., 1])

    def test_stays_within_the_levels(self) -> None:
        white = np.full((16, 16, 3), 255, dtype=np.uint8)
        assert Noise().apply(white, NoisePlan(0.1, 0)).min() > 100  # no overflow to black

    def test_strength_is_uniform_and_seeds_differ(self) -> None:
        rng, op = np.random.default_rng(0), Noise(sigma=(0.1, 0.3))
        plans = [op.draw(rng) for _ in range(DRAWS)]
        assert np.mean([plan.sigma for plan in plans]) == pytest.approx(0.2, abs=0.005)
        assert len({plan.seed for plan in plans}) == DRAWS
