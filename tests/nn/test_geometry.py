import math

import numpy as np
import pytest
import torch
from torch import Tensor

from raysl.nn import geometry
from raysl.nn.geometry import (
    alignment,
    covariance_spectrum,
    effective_rank,
    entropy,
    fit_power_law,
    log_mean_exp_on_sphere,
    uniformity,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(dim: int) -> Tensor:
    turn: Tensor = torch.linalg.qr(normal(dim, dim, seed=1)).Q
    return turn


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
        assert torch.equal(uniformity(z, most_rows=700), uniformity(z[:700], most_rows=700))


class TestEffectiveRank:
    def test_of_features_without_direction_is_their_width(self) -> None:
        assert effective_rank(torch.eye(6).repeat(9, 1)).item() == pytest.approx(6.0)

    @pytest.mark.parametrize("rank", [1, 2, 5])
    def test_of_equal_directions_is_their_number(self, rank: int) -> None:
        features = torch.eye(8)[:rank].repeat(40, 1) @ rotation(8).float()
        assert effective_rank(features).item() == pytest.approx(rank, rel=1e-4)

    @pytest.mark.parametrize("shape", [(40, 7), (7, 40), (6, 6)])
    def test_equals_the_equation_on_numpys_singular_values(self, shape: tuple[int, int]) -> None:
        features = normal(*shape)
        values = np.linalg.svd(features.numpy(), compute_uv=False)
        shares = values / values.sum()
        expected = math.exp(-(shares * np.log(shares)).sum())
        assert effective_rank(features).item() == pytest.approx(expected, rel=1e-6)

    def test_knows_neither_scale_nor_rotation_nor_order(self) -> None:
        features = normal(50, 6) * torch.arange(1, 7)
        expected = effective_rank(features).item()
        for same in (features * 1e-4, features @ rotation(6), features.flip(0)):
            assert effective_rank(same).item() == pytest.approx(expected, rel=1e-6)

    def test_is_the_same_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        features = normal(50, 6)
        whole = effective_rank(features), covariance_spectrum(features)
        monkeypatch.setattr(geometry, "_ROWS_AT_ONCE", 7)
        torch.testing.assert_close(effective_rank(features), whole[0])
        torch.testing.assert_close(covariance_spectrum(features), whole[1])

    def test_of_nothing_and_of_what_is_not_finite(self) -> None:
        assert effective_rank(torch.zeros(5, 3)).item() == 0.0
        assert math.isnan(effective_rank(torch.full((5, 3), math.inf)).item())


class TestCovarianceSpectrum:
    @pytest.mark.parametrize("shape", [(40, 7), (8, 30)])
    def test_are_numpys_eigenvalues(self, shape: tuple[int, int]) -> None:
        features = normal(*shape) + 5
        values = np.linalg.eigvalsh(np.cov(features.numpy(), rowvar=False))[::-1]
        found = covariance_spectrum(features)
        assert len(found) == min(shape[0] - 1, shape[1])
        np.testing.assert_allclose(found, values[: len(found)], rtol=1e-9)

    def test_knows_no_mean(self) -> None:
        features = normal(30, 5)
        torch.testing.assert_close(
            covariance_spectrum(features + 100), covariance_spectrum(features)
        )


class TestPowerLaw:
    @pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 2.5])
    def test_of_an_exact_one_is_its_exponent_and_scale(self, exponent: float) -> None:
        ranks = torch.arange(1, 201, dtype=torch.float64)
        law = fit_power_law(3.0 * ranks**-exponent)
        assert law is not None
        assert (law.first, law.last) == (4, 100)
        assert law.exponent == pytest.approx(exponent, abs=1e-10)
        assert law.scale == pytest.approx(3.0)

    def test_does_not_see_the_first_three_and_what_comes_after_a_hundred(self) -> None:
        values = torch.arange(1, 201, dtype=torch.float64) ** -1.5
        values[:3], values[100:] = 50.0, 1e-9
        law = fit_power_law(values)
        assert law is not None
        assert law.exponent == pytest.approx(1.5)

    def test_is_weighted_least_squares(self) -> None:
        values = normal(60).abs().sort(descending=True).values
        ranks = np.arange(4, 61)
        # numpy squares its weights: 1 / rank is the square of this.
        slope, constant = np.polyfit(
            np.log(ranks), np.log(values[3:].numpy()), 1, w=1 / np.sqrt(ranks)
        )
        law = fit_power_law(values)
        assert law is not None
        assert law.exponent == pytest.approx(-slope, rel=1e-9)
        assert law.scale == pytest.approx(math.exp(constant), rel=1e-9)
        assert law.last == 60

    def test_stops_where_only_rounding_is_left(self) -> None:
        values = torch.arange(1, 201, dtype=torch.float64) ** -1.0
        values[20:] = 1e-17
        law = fit_power_law(values)
        assert law is not None
        assert law.last == 20
        assert law.exponent == pytest.approx(1.0)

    @pytest.mark.parametrize("values", [[], [1.0], [1.0, 0.5, 0.2, 0.1], [0.0] * 9, [math.nan] * 9])
    def test_is_none_without_two_eigenvalues(self, values: list[float]) -> None:
        assert fit_power_law(torch.tensor(values, dtype=torch.float64)) is None


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
