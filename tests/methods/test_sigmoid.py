import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.errors import ShapeError
from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.methods.sigmoid import Sigmoid, SigmoidConfig, sigmoid_loss
from raysl.nn.backbones import Backbone

TRAINING_SET = TrainingSet(num_images=64, global_batch_size=8, view_sizes_px=(8, 8))


def sigmoid_by_hand(z0: Tensor, z1: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """Sec. 3.2 as loops, in float64."""
    x, y = F.normalize(z0.double(), dim=1), F.normalize(z1.double(), dim=1)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x)):
        for j in range(len(y)):
            label = 1.0 if i == j else -1.0
            logit = torch.dot(x[i], y[j]) / temperature.double() + bias.double()
            total = total - torch.log(1 / (1 + torch.exp(-label * logit)))
    return total / len(x)


def projections(n: int = 5, d: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z0 = torch.randn(n, d)
    return z0.requires_grad_(), (z0 * 2 + 3 * torch.randn(n, d)).detach().requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


class TestSigmoidLoss:
    @pytest.mark.parametrize(("temperature", "bias"), [(0.1, -10.0), (0.5, 0.0), (1.0, 2.0)])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, temperature: float, bias: float
    ) -> None:
        given = [*projections(), scalar(temperature), scalar(bias)]
        loss = sigmoid_loss(given[0], given[1], temperature=given[2], bias=given[3])
        expected = sigmoid_by_hand(*given)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        by_hand = torch.autograd.grad(expected, given)
        for gradient, exact in zip(torch.autograd.grad(loss, given), by_hand, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6 / temperature)

    def test_gradient_is_that_of_the_loss_by_finite_differences(self) -> None:
        given = [x.detach().double().requires_grad_() for x in (*projections(), scalar(0.5))]
        bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

        def loss(z0: Tensor, z1: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
            return sigmoid_loss(z0, z1, temperature=temperature, bias=bias)

        assert torch.autograd.gradcheck(loss, [*given, bias])

    @pytest.mark.parametrize("n", [1, 2, 33])
    def test_uniform_embeddings_have_a_closed_form(self, n: int) -> None:
        z = torch.ones(n, 3)
        expected = math.log1p(math.exp(-2)) + (n - 1) * math.log1p(math.exp(2))
        assert sigmoid_loss(z, z, temperature=0.5, bias=0.0).item() == pytest.approx(expected)

    def test_orthogonal_images_with_equal_views_have_a_closed_form(self) -> None:
        z = torch.eye(6)
        expected = math.log1p(math.exp(-5 + 1)) + 5 * math.log1p(math.exp(-1))
        assert sigmoid_loss(z, z, temperature=0.2, bias=-1.0).item() == pytest.approx(expected)

    def test_the_papers_start_weighs_the_positives_and_hardly_the_negatives(self) -> None:
        """Temperature 0.1 and bias -10: a pair of random directions costs log(1 + exp(-10))."""
        z0, z1 = torch.eye(6)[:3], torch.eye(6)[3:]
        expected = math.log1p(math.exp(10)) + 2 * math.log1p(math.exp(-10))
        assert sigmoid_loss(z0, z1, temperature=0.1, bias=-10.0).item() == pytest.approx(expected)

    def test_does_not_depend_on_the_order_of_images_or_views_or_on_lengths(self) -> None:
        z0, z1 = projections()
        loss = sigmoid_loss(z0, z1, temperature=0.1, bias=-3.0).item()
        order = torch.tensor([3, 0, 4, 1, 2])
        lengths = torch.tensor([0.1, 1.0, 3.0, 20.0, 0.5])[:, None]
        for a, b in ((z0[order], z1[order]), (z1, z0), (z0 * lengths, z1 * 9)):
            assert sigmoid_loss(a, b, temperature=0.1, bias=-3.0).item() == pytest.approx(loss)

    def test_is_exact_under_autocast(self) -> None:
        z0, z1 = projections()
        loss = sigmoid_loss(z0, z1, temperature=0.1, bias=-10.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sigmoid_loss(z0, z1, temperature=0.1, bias=-10.0), loss)
        half = [z.detach().bfloat16() for z in (z0, z1)]
        assert sigmoid_loss(half[0], half[1], temperature=0.1, bias=-10.0).dtype == torch.float32

    @pytest.mark.parametrize("other", [(4, 8), (5, 7), (8,)])
    def test_says_which_shapes_it_got(self, other: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError) as caught:
            sigmoid_loss(torch.zeros(5, 8), torch.zeros(other), temperature=0.1, bias=0.0)
        assert str(caught.value) == f"z0 and z1 must both be (N, D); got (5, 8), {other}"


class TestSigmoid:
    def build(self, backbone: Backbone) -> Sigmoid:
        return Sigmoid(SigmoidConfig(projection_dim=4), backbone, TRAINING_SET)

    def test_starts_at_the_papers_temperature_and_bias_and_learns_both(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        progress: Progress,
    ) -> None:
        method = self.build(tiny_backbone())
        assert method.log_scale.exp().item() == pytest.approx(10.0)
        optimizer = torch.optim.SGD([method.log_scale, method.bias], lr=1e-3)
        batch = Batch(make_views(), torch.arange(8))
        before = method(batch, progress)
        assert before.metrics["sigmoid/temperature"].item() == pytest.approx(0.1)
        assert before.metrics["sigmoid/bias"].item() == -10.0
        before.loss.backward()
        optimizer.step()
        after = method(batch, progress)
        assert after.loss < before.loss
        assert before.metrics["sigmoid/bias"].item() == -10.0  # not a view of the parameter
        for name in ("sigmoid/temperature", "sigmoid/bias"):
            assert after.metrics[name] != before.metrics[name]

    def test_loss_is_that_of_projections_of_both_views_normed_together(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        progress: Progress,
    ) -> None:
        method = self.build(tiny_backbone())
        views = make_views()
        output = method(Batch(views, torch.arange(8)), progress)
        z0, z1 = method.projector(method.backbone(torch.cat(views))).detach().split(8)
        expected = sigmoid_by_hand(z0, z1, torch.tensor(0.1), torch.tensor(-10.0))
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert 0.0 <= output.metrics["sigmoid/partner_top1"] <= 1.0

    def test_a_single_image_is_a_batch_too(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        progress: Progress,
    ) -> None:
        output = self.build(tiny_backbone())(Batch(make_views(1), torch.arange(1)), progress)
        assert all(value.isfinite() for value in [output.loss, *output.metrics.values()])
