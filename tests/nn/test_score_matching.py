import pytest
import torch

from raysl.errors import ShapeError
from raysl.nn.langevin import energy_gradient
from raysl.nn.score_matching import denoising_score_loss

EXACT = torch.float64


class TestDenoisingScoreLoss:
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(self) -> None:
        torch.manual_seed(0)
        scores = torch.randn(3, 2, 4, dtype=EXACT, requires_grad=True)
        noise, sigma = torch.randn(3, 2, 4, dtype=EXACT), torch.rand(3, dtype=EXACT)
        total = torch.zeros((), dtype=EXACT)
        for n in range(3):
            for i in range(2):
                for j in range(4):
                    total = total + (sigma[n] * scores[n, i, j] + noise[n, i, j]) ** 2
        loss, expected = denoising_score_loss(scores, noise, sigma), total / (2 * 3 * 8)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        found, exact = (torch.autograd.grad(value, scores)[0] for value in (loss, expected))
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)

    def test_a_score_of_nothing_leaves_half_the_noise(self) -> None:
        torch.manual_seed(0)
        noise = torch.randn(100, 3, 8, 8)
        loss = denoising_score_loss(torch.zeros_like(noise), noise, torch.ones(100))
        assert loss.item() == pytest.approx(0.5, abs=0.01)

    def test_the_direction_back_leaves_none(self) -> None:
        noise, sigma = torch.randn(4, 3, 8, 8), torch.rand(4) + 0.1
        loss = denoising_score_loss(-noise / sigma.view(-1, 1, 1, 1), noise, sigma)
        assert loss.item() == pytest.approx(0.0, abs=1e-12)

    def test_of_a_gaussian_is_least_at_the_score_of_the_noisy_one(self) -> None:
        """E = w x^2 / 2 of data N(0, s^2): w = 1 / (s^2 + sigma^2), and 1/2 s^2 / (...) is left."""
        torch.manual_seed(0)
        s, sigma = 1.5, 0.8
        data, noise = (torch.randn(200_000, 1, dtype=EXACT) for _ in range(2))
        weight = torch.tensor(1.0, dtype=EXACT, requires_grad=True)
        noisy = s * data + sigma * noise
        slope = energy_gradient(
            lambda x: 0.5 * weight * x.square().sum(dim=1), noisy, create_graph=True
        )
        levels = torch.full((len(data),), sigma, dtype=EXACT)
        loss = denoising_score_loss(-slope, noise, levels)
        first, second = loss, None
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(first, weight)
        best = (weight - first / second).detach()  # exact: the loss is quadratic in the weight
        assert best.item() == pytest.approx(1 / (s**2 + sigma**2), rel=0.01)
        least = denoising_score_loss(-best * noisy, noise, levels)
        assert least.item() == pytest.approx(0.5 * s**2 / (s**2 + sigma**2), rel=0.01)

    def test_passes_gradcheck(self) -> None:
        scores = torch.randn(2, 3, dtype=EXACT, requires_grad=True)
        noise, sigma = torch.randn(2, 3, dtype=EXACT), torch.rand(2, dtype=EXACT)
        assert torch.autograd.gradcheck(lambda x: denoising_score_loss(x, noise, sigma), (scores,))

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((4, 3), (4, 2), (4,)), r"got \(4, 3\), \(4, 2\), \(4,\)"),
            (((4, 3), (4, 3), (4, 1)), r"noise_std \(N,\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shapes: tuple[tuple[int, ...], ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            denoising_score_loss(*(torch.zeros(shape) for shape in shapes))
