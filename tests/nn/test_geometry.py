import math

import pytest
import torch

from raysl.nn.geometry import alignment, entropy, log_mean_exp_on_sphere, uniformity


class TestAlignment:
    def test_is_the_squared_distance_of_directions_and_not_of_lengths(self) -> None:
        z0 = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        z1 = torch.tensor([[7.0, 0.0], [3.0, 0.0]])
        assert alignment(z0, z1).item() == pytest.approx((0 + 2) / 2)

    def test_is_four_for_opposite_views(self) -> None:
        z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        assert alignment(z, -z).item() == pytest.approx(4.0)


class TestUniformity:
    def test_equals_the_equation_written_as_loops(self) -> None:
        z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        rows = [row / row.norm() for row in z.double()]
        potentials = [
            math.exp(-2 * float((rows[i] - rows[j]).square().sum()))
            for i in range(6)
            for j in range(i)
        ]
        expected = math.log(sum(potentials) / len(potentials))
        assert uniformity(z).item() == pytest.approx(expected, rel=1e-5)

    def test_is_zero_for_one_direction_and_minus_eight_for_opposite_ones(self) -> None:
        assert uniformity(torch.ones(4, 3)).item() == pytest.approx(0.0, abs=1e-5)
        assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-8.0)

    def test_of_one_row_is_zero_and_of_many_that_of_the_first_ones(self) -> None:
        assert uniformity(torch.ones(1, 3)).item() == 0.0
        z = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(uniformity(z), uniformity(z[:512]))


def test_entropy_is_zero_for_certain_rows_and_the_log_of_the_classes_for_even_ones() -> None:
    assert entropy(torch.eye(4)).item() == 0.0
    assert entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))


class TestNormaliserOnTheSphere:
    def test_in_3_dimensions_is_sinh_over_kappa(self) -> None:
        for kappa in (0.1, 1.0, 14.3, 50.0):
            expected = math.log(math.sinh(kappa) / kappa)
            assert log_mean_exp_on_sphere(3, kappa) == pytest.approx(expected, rel=1e-9)

    def test_on_the_circle_is_a_bessel_function(self) -> None:
        for kappa in (0.5, 14.3):
            expected = torch.special.i0(torch.tensor(kappa, dtype=torch.float64)).log().item()
            assert log_mean_exp_on_sphere(2, kappa) == pytest.approx(expected, rel=1e-9)

    def test_in_many_dimensions_is_that_of_a_gaussian_cosine(self) -> None:
        assert log_mean_exp_on_sphere(4096, 10.0) == pytest.approx(100 / (2 * 4096), rel=1e-3)
