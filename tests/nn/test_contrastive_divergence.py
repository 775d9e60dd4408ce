import pytest
import torch

from raysl.errors import ShapeError
from raysl.nn.contrastive_divergence import contrastive_divergence_loss

EXACT = torch.float64


class TestContrastiveDivergenceLoss:
    def test_equals_the_equation_written_as_loops(self) -> None:
        torch.manual_seed(0)
        data, samples = torch.randn(5, dtype=EXACT), torch.randn(7, dtype=EXACT)
        expected = sum(data) / 5 - sum(samples) / 7
        expected += 0.3 * (sum(e**2 for e in data) / 5 + sum(e**2 for e in samples) / 7)
        loss = contrastive_divergence_loss(data, samples, regularisation=0.3)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)

    def test_gradient_of_a_linear_energy_is_the_difference_of_mean_statistics(self) -> None:
        """E = w . t(x): the derivative is E_data[t] - E_model[t], a closed form."""
        torch.manual_seed(0)
        data, samples = torch.randn(6, 4, dtype=EXACT), torch.randn(9, 4, dtype=EXACT)
        weight = torch.randn(4, dtype=EXACT, requires_grad=True)
        contrastive_divergence_loss(data @ weight, samples @ weight).backward()
        torch.testing.assert_close(weight.grad, data.mean(dim=0) - samples.mean(dim=0))

    def test_with_exact_samples_its_gradient_is_that_of_the_likelihood(self) -> None:
        """A Gaussian exp(-w x^2 / 2): -log likelihood is w x^2 / 2 - log(w) / 2."""
        torch.manual_seed(0)
        data = 2 * torch.randn(1000, dtype=EXACT)
        weight = torch.tensor(0.8, dtype=EXACT, requires_grad=True)
        likelihood = (0.5 * weight * data.square() - 0.5 * weight.log()).mean()
        (expected,) = torch.autograd.grad(likelihood, weight)
        samples = torch.randn(400_000, dtype=EXACT) / weight.detach().sqrt()
        loss = contrastive_divergence_loss(
            0.5 * weight * data.square(), 0.5 * weight * samples.square()
        )
        (found,) = torch.autograd.grad(loss, weight)
        assert found.item() == pytest.approx(expected.item(), abs=0.005)

    def test_equal_energies_give_twice_alpha_times_their_square(self) -> None:
        same = torch.full((4,), 3.0)
        assert contrastive_divergence_loss(same, same, regularisation=0.5).item() == 9.0
        assert contrastive_divergence_loss(same, same).item() == 0.0

    def test_passes_gradcheck(self) -> None:
        data, samples = (torch.randn(n, dtype=EXACT, requires_grad=True) for n in (3, 5))
        assert torch.autograd.gradcheck(
            lambda a, b: contrastive_divergence_loss(a, b, regularisation=0.2), (data, samples)
        )

    def test_says_which_shapes_it_got(self) -> None:
        with pytest.raises(ShapeError, match=r"must be \(N,\) and \(M,\); got \(4, 1\), \(4,\)"):
            contrastive_divergence_loss(torch.zeros(4, 1), torch.zeros(4))
