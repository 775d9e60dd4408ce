import math

import pytest
import torch

from raysl.errors import CollapsedError, DivergedError
from raysl.nn.geometry import effective_rank, feature_std
from raysl.train.health import HealthCheck, HealthConfig


def metrics(
    *, loss: float = 1.0, grad_norm: float = 1.0, feature_std: float = 0.9, lr: float = 0.125
) -> dict[str, float]:
    return {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/feature_std": feature_std,
        "train/lr": lr,
    }


class TestFeatureStd:
    def test_of_identical_rows_is_zero(self) -> None:
        assert feature_std(torch.full((16, 8), 3.0)).item() == pytest.approx(0.0, abs=1e-6)

    def test_of_rows_that_differ_only_in_length_is_zero(self) -> None:
        lengths = torch.arange(1.0, 17.0)[:, None]
        assert feature_std(lengths * torch.randn(1, 8)).item() == pytest.approx(0.0, abs=1e-3)

    def test_of_opposite_directions_is_one(self) -> None:
        """Every coordinate has mean 0 and mean square 1 / D."""
        rows = torch.cat([torch.eye(8), -torch.eye(8)])
        assert feature_std(rows).item() == pytest.approx(1.0)

    def test_of_an_orthonormal_basis_has_a_closed_form(self) -> None:
        expected = math.sqrt(1 - 1 / 8)  # each coordinate: mean 1 / D, mean square 1 / D
        assert feature_std(5 * torch.eye(8)).item() == pytest.approx(expected)

    def test_of_random_directions_is_about_one(self) -> None:
        torch.manual_seed(0)
        assert feature_std(torch.randn(4000, 64)).item() == pytest.approx(1.0, abs=0.01)

    def test_is_float32_also_for_half_precision(self) -> None:
        assert feature_std(torch.randn(4, 8).bfloat16()).dtype == torch.float32


class TestEffectiveRank:
    @pytest.mark.parametrize("shape", [(64, 8), (8, 64), (1, 5)])
    def test_of_identical_rows_is_one(self, shape: tuple[int, int]) -> None:
        rows = torch.linspace(1, 2, shape[1]).expand(shape)
        assert effective_rank(rows).item() == pytest.approx(1.0, abs=1e-4)

    @pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)])
    def test_of_orthonormal_rows_or_columns_is_full(self, shape: tuple[int, int]) -> None:
        torch.manual_seed(0)
        basis = torch.linalg.qr(torch.randn(20, 6))[0]
        rows = {(6, 6): torch.eye(6) * 4, (6, 20): basis.T, (20, 6): basis}[shape]
        assert effective_rank(rows).item() == pytest.approx(6.0, rel=1e-5)

    @pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
    def test_is_the_entropy_of_the_singular_values(self, shape: tuple[int, int]) -> None:
        torch.manual_seed(1)
        rows = torch.randn(shape)
        values = torch.linalg.svdvals(rows.double()).tolist()
        shares = [value / sum(values) for value in values]
        expected = math.exp(-sum(share * math.log(share) for share in shares))
        assert effective_rank(rows).item() == pytest.approx(expected, rel=1e-5)
        assert effective_rank(rows * 100).item() == pytest.approx(expected, rel=1e-5)

    def test_of_nothing_but_zeros_is_zero(self) -> None:
        assert effective_rank(torch.zeros(4, 3)).item() == 0.0

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_of_features_that_are_not_finite_is_nan_and_not_an_error(self, value: float) -> None:
        """Else a diverged run would end in LinAlgError before HealthCheck can name the cause."""
        rows = torch.randn(8, 4)
        rows[3, 2] = value
        assert math.isnan(effective_rank(rows).item())


class TestDivergence:
    @pytest.mark.parametrize("name", ["loss", "grad_norm"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_is_named_with_step_rate_and_settings_to_change(self, name: str, value: float) -> None:
        check = HealthCheck(HealthConfig())
        with pytest.raises(DivergedError) as caught:
            check(metrics(**{name: value}), step=1200)
        message = str(caught.value)
        assert message.startswith(f"train/{name} is {value} at step 1200 (learning rate 0.125)")
        for setting in ("optim.base_lr", "optim.warmup", "optim.max_grad_norm", "train.precision"):
            assert setting in message

    def test_is_reported_before_a_collapse(self) -> None:
        check = HealthCheck(HealthConfig(patience=1))
        with pytest.raises(DivergedError):
            check(metrics(loss=math.nan, feature_std=0.0), step=1)


class TestCollapse:
    def test_stops_the_run_after_as_many_logging_steps_as_patience(self) -> None:
        check = HealthCheck(HealthConfig(min_feature_std=0.1, patience=3))
        check(metrics(feature_std=0.09), step=10)
        check(metrics(feature_std=0.0), step=20)
        with pytest.raises(CollapsedError) as caught:
            check(metrics(feature_std=0.05), step=30)
        message = str(caught.value)
        assert "train/feature_std is 0.05 at step 30" in message
        assert "health.min_feature_std=0.1 for 3 logging steps" in message
        for setting in ("method.temperature", "optim.base_lr", "health.min_feature_std=0"):
            assert setting in message

    def test_a_step_that_is_well_starts_the_count_anew(self) -> None:
        check = HealthCheck(HealthConfig(min_feature_std=0.1, patience=2))
        for step in range(20):
            check(metrics(feature_std=0.05 if step % 2 else 0.2), step=step)

    def test_the_limit_itself_is_well(self) -> None:
        check = HealthCheck(HealthConfig(min_feature_std=0.1, patience=1))
        check(metrics(feature_std=0.1), step=1)

    def test_a_limit_of_zero_never_stops(self) -> None:
        check = HealthCheck(HealthConfig(min_feature_std=0.0, patience=1))
        for step in range(10):
            check(metrics(feature_std=0.0), step=step)
