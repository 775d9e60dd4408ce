from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.methods.barlow import Barlow, BarlowConfig, barlow_loss
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.nn.backbones import Backbone, BackboneConfig

SMALL = BarlowConfig(hidden_dim=8, projection_dim=5)


def barlow_by_hand(z0: Tensor, z1: Tensor, redundancy: float) -> Tensor:
    """Eq. (1) and (2) as the paper writes them: loops over images and entries, in float64."""
    n, d = z0.shape

    def normalized(z: Tensor) -> list[list[Tensor]]:
        columns = []
        for j in range(d):
            column = [z[b, j].double() for b in range(n)]
            mean = sum(column) / n
            variance = sum((x - mean) ** 2 for x in column) / n
            columns.append([(x - mean) / torch.sqrt(variance + 1e-5) for x in column])
        return columns

    a, b = normalized(z0), normalized(z1)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(d):
        for j in range(d):
            c = sum(x * y for x, y in zip(a[i], b[j], strict=True)) / n
            total = total + ((1 - c) ** 2 if i == j else redundancy * c**2)
    return total


def projections(n: int = 6, d: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(n, d, generator=generator) * torch.tensor([0.1, 1.0, 3.0, 20.0])[:d] + 2
    z1 = z0 + 2 * torch.randn(n, d, generator=generator)
    return z0.requires_grad_(), z1.detach().requires_grad_()


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


class TestBarlowLoss:
    @pytest.mark.parametrize("redundancy", [0.0, 0.005, 1.0])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, redundancy: float
    ) -> None:
        z0, z1 = projections()
        loss = barlow_loss(z0, z1, redundancy=redundancy)
        expected = barlow_by_hand(z0, z1, redundancy)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, [z0, z1])
        by_hand = torch.autograd.grad(expected, [z0, z1])
        for gradient, exact in zip(gradients, by_hand, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)

    def test_gradient_is_that_of_finite_differences(self) -> None:
        z0, z1 = (z.detach().double().requires_grad_() for z in projections())
        assert torch.autograd.gradcheck(lambda a, b: barlow_loss(a, b, redundancy=0.3), (z0, z1))

    def test_equal_views_with_uncorrelated_entries_give_zero(self) -> None:
        hadamard = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        loss = barlow_loss(7 * hadamard + 3, 7 * hadamard - 1, redundancy=1.0)
        assert loss.item() == pytest.approx(0.0, abs=1e-9)

    def test_equal_views_with_equal_entries_give_redundancy_for_each_pair(self) -> None:
        z = torch.randn(9, 1, generator=torch.Generator().manual_seed(0)) * 10
        loss = barlow_loss(z.expand(9, 5), z.expand(9, 5), redundancy=0.25)
        assert loss.item() == pytest.approx(0.25 * 5 * 4, rel=1e-5)

    def test_collapsed_embeddings_give_the_number_of_entries(self) -> None:
        z = torch.full((8, 6), 3.0)
        assert barlow_loss(z, z, redundancy=0.1).item() == pytest.approx(6.0)

    def test_independent_views_give_what_chance_gives(self) -> None:
        generator = torch.Generator().manual_seed(0)
        z0, z1 = (torch.randn(400, 40, generator=generator) for _ in range(2))
        expected = 40 + 0.5 * 40 * 39 / 400
        assert barlow_loss(z0, z1, redundancy=0.5).item() == pytest.approx(expected, rel=0.05)

    def test_does_not_depend_on_scale_or_origin_of_an_entry_or_the_order_of_images(self) -> None:
        z0, z1 = (z.detach() for z in projections())
        loss = barlow_loss(z0, z1, redundancy=0.1).item()
        scale, order = torch.tensor([1.5, 8.0, 3.0, 2.0]), torch.tensor([3, 0, 5, 4, 1, 2])
        # Not exactly: 1e-5 is added to the variance.
        moved = barlow_loss(z0 * scale - 4, z1 * 9, redundancy=0.1).item()
        assert moved == pytest.approx(loss, rel=1e-3)
        assert barlow_loss(z0[order], z1[order], redundancy=0.1).item() == pytest.approx(loss)

    def test_does_not_depend_on_the_order_of_views_or_entries(self) -> None:
        z0, z1 = (z.detach() for z in projections())
        loss = barlow_loss(z0, z1, redundancy=0.1).item()
        assert barlow_loss(z1, z0, redundancy=0.1).item() == pytest.approx(loss)
        flipped = barlow_loss(z0.flip(1), z1.flip(1), redundancy=0.1).item()
        assert flipped == pytest.approx(loss)
        assert barlow_loss(z0, z1.flip(1), redundancy=0.1).item() > loss + 0.1

    def test_embeddings_of_one_entry_have_no_pairs(self) -> None:
        z0, z1 = projections(d=1)
        loss = barlow_loss(z0, z1, redundancy=5.0).item()
        assert loss == pytest.approx(barlow_by_hand(z0, z1, 0.0).item(), rel=1e-5)

    def test_is_exact_under_autocast_and_for_half_precision(self) -> None:
        z0, z1 = projections()
        loss = barlow_loss(z0, z1, redundancy=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(barlow_loss(z0, z1, redundancy=0.1), loss)
        half = [z.detach().bfloat16() for z in (z0, z1)]
        found = barlow_loss(*half, redundancy=0.1)
        assert found.dtype == loss.dtype == torch.float32
        assert torch.equal(found, barlow_loss(*(z.float() for z in half), redundancy=0.1))

    @pytest.mark.parametrize(
        ("shape0", "shape1", "message"),
        [
            ((5, 8), (4, 8), r"both be \(N, D\); got \(5, 8\), \(4, 8\)"),
            ((8,), (8,), r"got \(8,\), \(8,\)"),
            ((1, 8), (1, 8), r"2 images or more; z0 and z1 are \(1, 8\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shape0: tuple[int, ...], shape1: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            barlow_loss(torch.zeros(shape0), torch.zeros(shape1), redundancy=0.1)


class TestBarlow:
    def test_loss_is_that_of_projections_normed_one_view_at_a_time(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
        progress: Progress,
    ) -> None:
        config = BarlowConfig(hidden_dim=8, projection_dim=5, redundancy=0.1, loss_scale=0.5)
        method = Barlow(config, tiny_backbone(), training_set)
        views = make_views()
        output = method(batch_of(views), progress)
        z0, z1 = (method.projector(method.backbone(view)).detach() for view in views)
        expected = 0.5 * barlow_by_hand(z0, z1, 0.1).item()
        assert output.loss.item() == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(output.features, method.encoder(views[0]).detach())

    def test_loss_is_the_papers_unless_scaled(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
        progress: Progress,
    ) -> None:
        assert BarlowConfig().loss_scale == 1.0
        method = Barlow(SMALL, tiny_backbone(), training_set)
        views = make_views()
        z0, z1 = (method.projector(method.backbone(view)).detach() for view in views)
        expected = barlow_by_hand(z0, z1, 0.0051).item()
        assert method(batch_of(views), progress).loss.item() == pytest.approx(expected, rel=1e-4)

    def test_metrics_are_the_mean_of_the_diagonal_and_of_what_lies_off_it(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
        progress: Progress,
    ) -> None:
        method = Barlow(SMALL, tiny_backbone(), training_set)
        views = make_views()
        metrics = method(batch_of(views), progress).metrics
        z0, z1 = (method.projector(method.backbone(view)).detach() for view in views)
        correlation = torch.corrcoef(torch.cat([z0, z1], dim=1).T)[:5, 5:]
        diagonal = correlation.diagonal().mean().item()
        off = correlation[~torch.eye(5, dtype=torch.bool)].abs().mean().item()
        assert metrics["barlow/diagonal"].item() == pytest.approx(diagonal, abs=1e-2)
        assert metrics["barlow/off_diagonal"].item() == pytest.approx(off, abs=1e-2)

    def test_projector_is_the_papers(
        self, tiny_backbone: Callable[..., Backbone], training_set: TrainingSet
    ) -> None:
        # Three linear layers, batch norm and ReLU after the first two, no biases (main.py).
        kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
        projector = Barlow(SMALL, tiny_backbone(), training_set).projector
        assert [type(layer) for layer in projector] == [*kinds, *kinds, nn.Linear]
        linear = [layer for layer in projector if isinstance(layer, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in linear] == [(6, 8), (8, 8), (8, 5)]
        assert all(layer.bias is None for layer in linear)
        assert (BarlowConfig().hidden_dim, BarlowConfig().projection_dim) == (8192, 8192)

    def test_refuses_batches_of_one_image(self) -> None:
        with pytest.raises(ConfigError, match=r"train\.global_batch_size=1, use 2 or more"):
            SMALL.check_shape(RunShape(1, 1, (32, 32), BackboneConfig()))
        SMALL.check_shape(RunShape(2, 1, (32, 32), BackboneConfig()))
