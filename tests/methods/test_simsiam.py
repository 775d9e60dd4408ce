from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import ShapeError
from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.methods.simsiam import SimSiam, SimSiamConfig, simsiam_loss
from raysl.nn.backbones import Backbone
from raysl.nn.geometry import feature_std

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]

SMALL = SimSiamConfig(hidden_dim=10, projection_dim=8, predictor_hidden_dim=3)


def simsiam_by_hand(prediction: Tensor, projection: Tensor) -> Tensor:
    """Eq. (1), image by image, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for p, z in zip(prediction.double(), projection.double(), strict=True):
        total = total - sum(p[i] * z[i] for i in range(len(p))) / (p.norm() * z.norm())
    return total / len(prediction)


def pair(n: int = 5, d: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    prediction = torch.randn(n, d)
    return prediction.requires_grad_(), prediction.detach() * 2 + 3 * torch.randn(n, d)


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


class TestSimsiamLoss:
    @pytest.mark.parametrize("shape", [(5, 7), (1, 3), (33, 2)])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, shape: tuple[int, int]
    ) -> None:
        prediction, projection = pair(*shape)
        loss = simsiam_loss(prediction, projection)
        expected = simsiam_by_hand(prediction, projection)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, prediction)
        (exact,) = torch.autograd.grad(expected, prediction)
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("direction", "expected"), [((3, 0), -1), ((0, 5), 0), ((-2, 0), 1)])
    def test_equal_orthogonal_and_opposite_directions_have_closed_forms(
        self, direction: tuple[int, int], expected: int
    ) -> None:
        ones = torch.tensor([[1.0, 0.0]]).expand(4, 2)
        loss = simsiam_loss(ones, torch.tensor([direction]).float().expand(4, 2))
        assert loss.item() == pytest.approx(expected, abs=1e-6)

    def test_does_not_depend_on_lengths_or_on_the_order_of_images(self) -> None:
        prediction, projection = pair()
        loss = simsiam_loss(prediction, projection).item()
        lengths = torch.tensor([0.1, 1.0, 3.0, 20.0, 0.5])[:, None]
        scaled = simsiam_loss(prediction * lengths, projection * 9).item()
        assert scaled == pytest.approx(loss, rel=1e-5)
        order = torch.tensor([3, 0, 4, 1, 2])
        assert simsiam_loss(prediction[order], projection[order]).item() == pytest.approx(loss)

    def test_no_gradient_goes_into_the_projection(self) -> None:
        prediction, projection = pair()
        projection.requires_grad_()
        simsiam_loss(prediction, projection).backward()
        assert projection.grad is None
        assert prediction.grad is not None

    def test_gradient_is_right(self) -> None:
        prediction, projection = (x.detach().double() for x in pair())
        assert torch.autograd.gradcheck(
            lambda x: simsiam_loss(x, projection), (prediction.requires_grad_(),)
        )

    def test_is_exact_under_autocast_and_of_half_precision_values(self) -> None:
        prediction, projection = pair()
        loss = simsiam_loss(prediction, projection)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(simsiam_loss(prediction, projection), loss)
        half = prediction.bfloat16(), projection.bfloat16()
        assert torch.equal(simsiam_loss(*half), simsiam_loss(half[0].float(), half[1].float()))

    @pytest.mark.parametrize(
        ("shape0", "shape1", "message"),
        [
            ((5, 8), (4, 8), r"prediction and projection must both be \(N, D\); got \(5, 8\), \(4"),
            ((5, 8), (5, 7), r"got \(5, 8\), \(5, 7\)"),
            ((8,), (8,), r"got \(8,\), \(8,\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shape0: tuple[int, ...], shape1: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            simsiam_loss(torch.zeros(shape0), torch.zeros(shape1))


class TestDirectionStd:
    def test_is_0_for_one_direction_and_1_for_directions_spread_evenly(self) -> None:
        torch.manual_seed(0)
        one = torch.randn(1, 64) * torch.linspace(1, 5, 50)[:, None]
        assert feature_std(one).item() == pytest.approx(0.0, abs=1e-5)
        assert feature_std(torch.randn(4000, 64)).item() == pytest.approx(1.0, abs=0.01)

    def test_of_both_ends_of_each_axis_is_exactly_1(self) -> None:
        ends = torch.cat([torch.eye(5), -torch.eye(5)]) * 3
        assert feature_std(ends.double()).item() == pytest.approx(1.0)


@pytest.fixture
def method(tiny_backbone: Backbones, training_set: TrainingSet) -> SimSiam:
    return SimSiam(SMALL, tiny_backbone(), training_set)


class TestSimSiam:
    def test_loss_is_the_mean_of_both_orders_with_each_view_normed_on_its_own(
        self, method: SimSiam, make_views: Views, progress: Progress
    ) -> None:
        views = make_views()
        output = method(batch_of(views), progress)
        z = [method.projector(method.backbone(view)) for view in views]
        p = [method.predictor(each) for each in z]
        expected = (simsiam_by_hand(p[0], z[1]) + simsiam_by_hand(p[1], z[0])) / 2
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        together = method.projector(method.backbone(torch.cat(views)))
        other = method.predictor(together).split(8)
        wrong = (simsiam_by_hand(other[0], z[1]) + simsiam_by_hand(other[1], z[0])) / 2
        assert output.loss.item() != pytest.approx(wrong.item(), rel=1e-3)

    def test_gradient_is_that_of_a_loss_whose_projections_are_constants(
        self, method: SimSiam, make_views: Views, progress: Progress
    ) -> None:
        views = make_views()
        with torch.no_grad():
            constants = [method.projector(method.backbone(view)) for view in views]
        p = [method.predictor(method.projector(method.backbone(view))) for view in views]
        expected = (simsiam_by_hand(p[0], constants[1]) + simsiam_by_hand(p[1], constants[0])) / 2
        weights = [q for q in method.parameters() if q.requires_grad]
        by_hand = torch.autograd.grad(expected, weights)
        found = torch.autograd.grad(method(batch_of(views), progress).loss, weights)
        for gradient, exact in zip(found, by_hand, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-6)

    def test_heads_are_those_of_the_authors_code(self, method: SimSiam) -> None:
        block = ["Linear", "BatchNorm1d", "ReLU"]
        assert [type(m).__name__ for m in method.projector] == [
            *block, *block, "Linear", "BatchNorm1d",
        ]  # fmt: skip
        assert not method.projector[-1].affine
        assert [type(m).__name__ for m in method.predictor] == [*block, "Linear"]
        assert method.predictor[-1].bias is not None
        linear = [m for m in method.modules() if isinstance(m, nn.Linear)]
        widths = [(m.in_features, m.out_features) for m in linear]
        assert widths == [(6, 10), (10, 10), (10, 8), (8, 3), (3, 8)]
        defaults = SimSiamConfig()
        assert (defaults.hidden_dim, defaults.projection_dim) == (2048, 2048)
        assert (defaults.projection_layers, defaults.predictor_hidden_dim) == (3, 512)

    def test_the_projector_may_have_two_layers(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        config = SimSiamConfig(hidden_dim=10, projection_dim=8, projection_layers=2)
        projector = SimSiam(config, tiny_backbone(), training_set).projector
        assert [type(m).__name__ for m in projector] == [
            "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d",
        ]  # fmt: skip

    @pytest.mark.parametrize("constant", [True, False])
    def test_the_predictors_learning_rate_stays_constant_if_so_configured(
        self, constant: bool, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        config = SMALL.model_copy(update={"constant_predictor_lr": constant})
        method = SimSiam(config, tiny_backbone(), training_set)
        assert list(method.constant_lr_modules) == ([method.predictor] if constant else [])
        assert SimSiamConfig().constant_predictor_lr

    def test_features_are_those_of_view_0_and_the_encoder_is_the_backbone_given(
        self,
        tiny_backbone: Backbones,
        training_set: TrainingSet,
        make_views: Views,
        progress: Progress,
    ) -> None:
        backbone = tiny_backbone()
        method = SimSiam(SMALL, backbone, training_set)
        assert method.encoder is backbone
        views = make_views()
        features = method(batch_of(views), progress).features
        torch.testing.assert_close(features, backbone(views[0]).detach())

    def test_metrics_tell_agreement_and_spread(
        self, method: SimSiam, make_views: Views, progress: Progress
    ) -> None:
        view = make_views()[0]
        metrics = method(batch_of([view, view]), progress).metrics
        assert metrics["simsiam/alignment"].item() == 0.0
        spread = feature_std(method.projector(method.backbone(view)))
        torch.testing.assert_close(metrics["simsiam/projection_std"], spread)
        assert 0.5 < spread.item() <= 1.0
