import math

import pytest
import torch
from torch import Tensor

from raysl.errors import ShapeError
from raysl.nn.noise_contrast import conditional_noise_contrastive_loss, noise_contrastive_loss


def by_hand(data: Tensor, noise: Tensor, p_data: Tensor, p_noise: Tensor, nu: float) -> Tensor:
    """Eq. (8) as the paper writes it: posterior probabilities of the classes, their logarithms."""
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(data)):
        model, other = data[n].exp(), nu * p_data[n].exp()
        total = total - torch.log(model / (model + other))
        for k in range(noise.shape[1]):
            model, other = noise[n, k].exp(), nu * p_noise[n, k].exp()
            total = total - torch.log(other / (model + other))
    return total / len(data)


def logits(n: int = 4, k: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n,), (n, k), (n,), (n, k))
    a, b, c, d = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return a.requires_grad_(), b.requires_grad_(), c, d


def loss_of(data: Tensor, noise: Tensor, p_data: Tensor, p_noise: Tensor, nu: float) -> Tensor:
    return noise_contrastive_loss(
        data, noise, data_log_noise=p_data, noise_log_noise=p_noise, num_noise=nu
    )


class TestNoiseContrastiveLoss:
    @pytest.mark.parametrize("nu", [1.0, 3.0, 100.0])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(self, nu: float) -> None:
        given = logits()
        loss, expected = loss_of(*given, nu), by_hand(*given, nu)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for found, exact in zip(
            torch.autograd.grad(loss, given[:2]),
            torch.autograd.grad(expected, given[:2]),
            strict=True,
        ):
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("k", [1, 5])
    def test_equal_densities_have_a_closed_form(self, k: int) -> None:
        data, noise = torch.randn(6), torch.randn(6, k)
        expected = math.log(1 + k) + k * math.log(1 + 1 / k)
        assert loss_of(data, noise, data, noise, k).item() == pytest.approx(expected, rel=1e-6)

    def test_is_finite_where_the_ratio_of_densities_is_not(self) -> None:
        far = torch.tensor([3000.0, -3000.0])
        loss = loss_of(far, -far[:, None], torch.zeros(2), torch.zeros(2, 1), 1)
        assert loss.item() == pytest.approx((0 + 0 + 3000 + 3000) / 2)

    def test_passes_gradcheck(self) -> None:
        data, noise, p_data, p_noise = logits()
        assert torch.autograd.gradcheck(
            lambda a, b: loss_of(a, b, p_data, p_noise, 2.0), (data, noise)
        )

    def test_is_float32_under_autocast_and_for_half_precision(self) -> None:
        given = [x.detach().bfloat16() for x in logits()]
        loss = loss_of(*given, 3.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss_of(*given, 3.0), loss)
        assert loss.dtype == torch.float32

    def test_finds_the_normaliser_of_a_gaussian(self) -> None:
        """The model exp(-x^2 / (2 s^2) - c) of data with deviation 2, noise of deviation 3."""
        torch.manual_seed(0)
        data = 2 * torch.randn(4000, dtype=torch.float64)
        noise = 3 * torch.randn(4000, 5, dtype=torch.float64)
        precision = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        c = torch.zeros((), dtype=torch.float64, requires_grad=True)
        known = torch.distributions.Normal(0.0, 3.0)
        optimizer = torch.optim.LBFGS([precision, c], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            model = [-0.5 * precision * x.square() - c for x in (data, noise)]
            loss = loss_of(*model, known.log_prob(data), known.log_prob(noise), 5)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert precision.item() == pytest.approx(1 / 4, abs=0.01)
        assert c.item() == pytest.approx(math.log(2 * math.sqrt(2 * math.pi)), abs=0.03)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((4,), (4, 2), (3,), (4, 2)), r"got \(4,\), \(3,\), \(4, 2\), \(4, 2\)"),
            (((4,), (4, 2), (4,), (4, 3)), r"got \(4,\), \(4,\), \(4, 2\), \(4, 3\)"),
            (((4,), (5, 2), (4,), (5, 2)), r"noise_logits and noise_log_noise \(N, K\)"),
            (((4, 1), (4, 2), (4, 1), (4, 2)), r"must be \(N,\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shapes: tuple[tuple[int, ...], ...], message: str
    ) -> None:
        a, b, c, d = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ShapeError, match=message):
            loss_of(a, b, c, d, 2)


class TestConditionalNoiseContrastiveLoss:
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(self) -> None:
        data, noise, _, _ = logits()
        expected = torch.zeros((), dtype=torch.float64)
        for n in range(4):
            for k in range(3):
                ratio = data[n].exp() / noise[n, k].exp()
                expected = expected + 2 / 12 * torch.log(1 + 1 / ratio)
        loss = conditional_noise_contrastive_loss(data, noise)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for found, exact in zip(
            torch.autograd.grad(loss, (data, noise)),
            torch.autograd.grad(expected, (data, noise)),
            strict=True,
        ):
            torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)

    def test_equal_probabilities_cost_two_log_2_and_no_constant_matters(self) -> None:
        data = torch.randn(5)
        same = conditional_noise_contrastive_loss(data, data[:, None].expand(5, 3))
        assert same.item() == pytest.approx(2 * math.log(2))
        noise = torch.randn(5, 3)
        loss = conditional_noise_contrastive_loss(data, noise)
        moved = conditional_noise_contrastive_loss(data + 7, noise + 7)
        assert moved.item() == pytest.approx(loss.item(), rel=1e-5)

    def test_is_finite_where_the_ratio_of_densities_is_not(self) -> None:
        far = torch.tensor([3000.0, -3000.0])
        loss = conditional_noise_contrastive_loss(far, -far[:, None])
        assert loss.item() == pytest.approx(6000)

    def test_passes_gradcheck(self) -> None:
        assert torch.autograd.gradcheck(conditional_noise_contrastive_loss, logits()[:2])

    def test_is_float32_under_autocast_and_for_half_precision(self) -> None:
        given = [x.detach().bfloat16() for x in logits()[:2]]
        loss = conditional_noise_contrastive_loss(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(conditional_noise_contrastive_loss(*given), loss)
        assert loss.dtype == torch.float32

    def test_finds_the_precision_of_a_gaussian_without_its_normaliser(self) -> None:
        """The model exp(-w x^2 / 2) of data with deviation 2, noise of deviation 1 on each."""
        torch.manual_seed(0)
        data = 2 * torch.randn(40_000, dtype=torch.float64)
        noise = data[:, None] + torch.randn(40_000, 5, dtype=torch.float64)
        precision = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([precision], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            model = [-0.5 * precision * x.square() for x in (data, noise)]
            loss = conditional_noise_contrastive_loss(*model)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert precision.item() == pytest.approx(1 / 4, abs=0.02)

    @pytest.mark.parametrize(
        ("data", "noise", "message"),
        [
            ((4,), (5, 2), r"got \(4,\), \(5, 2\)"),
            ((4,), (4,), r"noise_logits \(N, K\)"),
            ((4, 1), (4, 1, 2), r"must be \(N,\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, data: tuple[int, ...], noise: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            conditional_noise_contrastive_loss(torch.zeros(data), torch.zeros(noise))
