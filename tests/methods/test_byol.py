import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.errors import ShapeError
from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.methods.byol import BYOL, BYOLConfig, byol_loss
from raysl.nn.backbones import Backbone

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]

SMALL = BYOLConfig(hidden_dim=10, projection_dim=4)


def byol_by_hand(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. (2), image by image, as the squared distance of two unit vectors."""
    total = torch.zeros((), dtype=torch.float64)
    for q, z in zip(prediction.double(), target.double(), strict=True):
        a, b = q / torch.sqrt((q * q).sum()), z / torch.sqrt((z * z).sum())
        total = total + sum((a[i] - b[i]) ** 2 for i in range(len(a)))
    return total / len(prediction)


def pair(n: int = 5, d: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    prediction = torch.randn(n, d)
    return prediction.requires_grad_(), prediction.detach() * 2 + 3 * torch.randn(n, d)


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


class TestByolLoss:
    @pytest.mark.parametrize("shape", [(5, 7), (1, 3), (33, 2)])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, shape: tuple[int, int]
    ) -> None:
        prediction, target = pair(*shape)
        loss = byol_loss(prediction, target)
        expected = byol_by_hand(prediction, target)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, prediction)
        (exact,) = torch.autograd.grad(expected, prediction)
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)

    def test_is_two_minus_two_cosines(self) -> None:
        prediction, target = pair()
        cosines = F.cosine_similarity(prediction, target).mean()
        assert byol_loss(prediction, target).item() == pytest.approx(2 - 2 * cosines.item())

    @pytest.mark.parametrize(("direction", "expected"), [((3, 0), 0), ((0, 5), 2), ((-2, 0), 4)])
    def test_equal_orthogonal_and_opposite_directions_have_closed_forms(
        self, direction: tuple[int, int], expected: int
    ) -> None:
        ones = torch.tensor([[1.0, 0.0]]).expand(4, 2)
        loss = byol_loss(ones, torch.tensor([direction]).float().expand(4, 2))
        assert loss.item() == pytest.approx(expected, abs=1e-6)

    def test_is_exact_where_the_directions_nearly_agree(self) -> None:
        angle = 1e-4  # 2 - 2 cos is 1e-8: less than what float32 can tell from 1
        near = torch.tensor([[math.cos(angle), math.sin(angle)]])
        assert byol_loss(near, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(1e-8, rel=1e-3)

    def test_a_prediction_of_nothing_is_at_distance_1_from_every_direction(self) -> None:
        prediction = torch.zeros(3, 4, requires_grad=True)
        loss = byol_loss(prediction, torch.ones(3, 4))
        loss.backward()
        assert loss.item() == pytest.approx(1.0)
        assert prediction.grad is not None
        assert prediction.grad.isfinite().all()

    def test_does_not_depend_on_lengths_or_on_the_order_of_images(self) -> None:
        prediction, target = pair()
        loss = byol_loss(prediction, target).item()
        lengths = torch.tensor([0.1, 1.0, 3.0, 20.0, 0.5])[:, None]
        assert byol_loss(prediction * lengths, target * 9).item() == pytest.approx(loss, rel=1e-5)
        order = torch.tensor([3, 0, 4, 1, 2])
        assert byol_loss(prediction[order], target[order]).item() == pytest.approx(loss, rel=1e-6)
        assert byol_loss(target, prediction).item() == pytest.approx(loss, rel=1e-6)

    def test_no_gradient_goes_into_the_target(self) -> None:
        prediction, target = pair()
        target.requires_grad_()
        byol_loss(prediction, target).backward()
        assert target.grad is None
        assert prediction.grad is not None

    def test_gradient_is_right(self) -> None:
        prediction, target = (x.detach().double() for x in pair())
        assert torch.autograd.gradcheck(
            lambda x: byol_loss(x, target), (prediction.requires_grad_(),)
        )

    def test_is_exact_under_autocast_and_of_half_precision_values(self) -> None:
        prediction, target = pair()
        loss = byol_loss(prediction, target)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(byol_loss(prediction, target), loss)
        half = prediction.bfloat16(), target.bfloat16()
        assert torch.equal(byol_loss(*half), byol_loss(half[0].float(), half[1].float()))

    @pytest.mark.parametrize(
        ("shape0", "shape1", "message"),
        [
            (
                (5, 8),
                (4, 8),
                r"prediction and target must both be \(N, D\); got \(5, 8\), \(4, 8\)",
            ),
            ((5, 8), (5, 7), r"got \(5, 8\), \(5, 7\)"),
            ((8,), (8,), r"got \(8,\), \(8,\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shape0: tuple[int, ...], shape1: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            byol_loss(torch.zeros(shape0), torch.zeros(shape1))


@pytest.fixture
def method(tiny_backbone: Backbones, training_set: TrainingSet) -> BYOL:
    method = BYOL(SMALL, tiny_backbone(), training_set)
    with torch.no_grad():  # a target that differs from the online network, as it soon does
        for parameter in method.target.parameters():
            parameter.mul_(0.7).add_(0.02)
    return method


class TestBYOL:
    def test_loss_is_that_of_both_orders_added_with_each_view_normed_on_its_own(
        self, method: BYOL, make_views: Views, progress: Progress
    ) -> None:
        views = make_views()
        output = method(batch_of(views), progress)
        predictions = [method.predictor(method.online(view)) for view in views]
        targets = [method.target(view) for view in views]
        expected = byol_by_hand(predictions[0], targets[1]) + byol_by_hand(
            predictions[1], targets[0]
        )
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        together = method.predictor(method.online(torch.cat(views))).split(8)
        other = byol_by_hand(together[0], targets[1]) + byol_by_hand(together[1], targets[0])
        assert output.loss.item() != pytest.approx(other.item(), rel=1e-3)

    def test_loss_does_not_depend_on_which_view_comes_first(
        self, method: BYOL, make_views: Views, progress: Progress
    ) -> None:
        views = make_views()
        losses = [method(batch_of(order), progress).loss for order in (views, views[::-1])]
        torch.testing.assert_close(*losses)

    def test_features_are_those_of_view_0_before_the_head(
        self, method: BYOL, make_views: Views, progress: Progress
    ) -> None:
        views = make_views()
        features = method(batch_of(views), progress).features
        torch.testing.assert_close(features, method.encoder(views[0]).detach())

    def test_heads_are_those_of_the_authors_code(self, method: BYOL) -> None:
        for head, in_dim in ((method.online[1], 6), (method.predictor, 4)):
            assert isinstance(head, nn.Sequential)
            assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
            assert (head[0].in_features, head[0].out_features) == (in_dim, 10)
            assert (head[3].in_features, head[3].out_features) == (10, 4)
            assert head[3].bias is None
        defaults = BYOLConfig()
        assert (defaults.hidden_dim, defaults.projection_dim) == (4096, 256)

    def test_encoder_is_the_online_backbone_that_was_given(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        backbone = tiny_backbone()
        assert BYOL(SMALL, backbone, training_set).encoder is backbone

    def test_metrics_tell_agreement_and_collapse(
        self, method: BYOL, make_views: Views, progress: Progress
    ) -> None:
        view = make_views()[0]
        same = method(batch_of([view, view]), progress).metrics
        assert same["byol/alignment"].item() == 0.0
        assert same["byol/uniformity"].item() < -0.5
        method.online[1][3].weight.data.zero_()
        method.online[1][3].weight.data[:, 0] = 1.0  # all projections on one line
        method.online[1][1].bias.data[0] = 100.0
        collapsed = method(batch_of([view, view]), progress).metrics
        assert collapsed["byol/uniformity"].item() == pytest.approx(0.0, abs=1e-4)


class TestTarget:
    def test_starts_as_a_copy_that_no_gradient_reaches(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        training_set: TrainingSet,
        progress: Progress,
    ) -> None:
        method = BYOL(SMALL, tiny_backbone(), training_set)
        method(batch_of(make_views()), progress).loss.backward()
        pairs = list(zip(method.target.parameters(), method.online.parameters(), strict=True))
        assert all(torch.equal(target, online) for target, online in pairs)
        assert all(target.grad is None and not target.requires_grad for target, _ in pairs)
        assert not any(target.data_ptr() == online.data_ptr() for target, online in pairs)

    @pytest.mark.parametrize(
        ("step", "expected"), [(0, 0.9), (5, 0.9146447), (10, 0.95), (20, 1.0)]
    )
    def test_moves_by_the_momentum_of_the_step(
        self,
        step: int,
        expected: float,
        tiny_backbone: Backbones,
        training_set: TrainingSet,
        make_views: Views,
    ) -> None:
        """tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2, sec. 3.2."""
        config = BYOLConfig(hidden_dim=10, projection_dim=4, ema_momentum=0.9)
        method = BYOL(config, tiny_backbone(), training_set)
        with torch.no_grad():
            for parameter in method.online.parameters():
                parameter.add_(1.0)
        before = [parameter.clone() for parameter in method.target.parameters()]
        progress = Progress(step=step, total_steps=20, steps_per_epoch=5, seed=0)
        found = method(batch_of(make_views()), progress).metrics["byol/ema_momentum"]
        assert found.item() == pytest.approx(expected)
        method.after_optimizer_step(progress)
        for old, target in zip(before, method.target.parameters(), strict=True):
            torch.testing.assert_close(target, old + (1 - expected), rtol=1e-5, atol=1e-5)

    def test_can_move_by_the_same_momentum_to_the_end(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        config = BYOLConfig(
            hidden_dim=10, projection_dim=4, ema_momentum=0.5, final_ema_momentum=0.5
        )
        method = BYOL(config, tiny_backbone(), training_set)
        method.online[1][0].weight.data.fill_(2.0)
        method.target[1][0].weight.data.fill_(0.0)
        for step, expected in ((0, 1.0), (20, 1.5)):
            method.after_optimizer_step(Progress(step, 20, 5, 0))
            assert method.target[1][0].weight.unique().tolist() == [expected]

    def test_norms_by_its_own_batch_and_never_by_running_statistics(
        self, method: BYOL, make_views: Views, progress: Progress
    ) -> None:
        batch = batch_of(make_views())
        loss = method(batch, progress).loss
        norm = method.target[1][1]
        assert norm.training
        assert int(norm.num_batches_tracked) == 2  # one pass a view
        norm.running_mean.fill_(50.0)
        norm.running_var.fill_(1e-3)
        torch.testing.assert_close(method(batch, progress).loss, loss)

    def test_keeps_running_statistics_of_its_own_passes(
        self, method: BYOL, make_views: Views, progress: Progress
    ) -> None:
        method(batch_of(make_views()), progress)
        statistics = method.target[1][1].running_mean.clone()
        assert not torch.equal(statistics, method.online[1][1].running_mean)
        method.after_optimizer_step(progress)
        assert torch.equal(method.target[1][1].running_mean, statistics)
