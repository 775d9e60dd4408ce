from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.vicreg import VICReg, VICRegConfig, vicreg_loss
from raysl.nn.backbones import Backbone, BackboneConfig

SMALL = VICRegConfig(hidden_dim=8, projection_dim=5)
PUBLISHED = {"similarity": 25.0, "variance": 25.0, "covariance": 1.0}


def vicreg_by_hand(
    z0: Tensor, z1: Tensor, similarity: float, variance: float, covariance: float
) -> Tensor:
    """Eq. (1) to (6) as loops in float64, with the authors' factors: 1/D in s, 1/2 before v."""
    n, d = z0.shape
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        for j in range(d):
            total = total + similarity * (z0[i, j].double() - z1[i, j].double()) ** 2 / (n * d)
    for z in (z0, z1):
        rows = [[z[i, j].double() for i in range(n)] for j in range(d)]
        means = [sum(row) / n for row in rows]
        for j in range(d):
            for k in range(d):
                c = sum(
                    (x - means[j]) * (y - means[k]) for x, y in zip(rows[j], rows[k], strict=True)
                ) / (n - 1)
                if j == k:
                    total = total + variance / 2 * torch.relu(1 - torch.sqrt(c + 1e-4)) / d
                else:
                    total = total + covariance * c**2 / d
    return total


def embeddings(n: int = 6, d: int = 4) -> tuple[Tensor, Tensor]:
    """Entries of which some vary more than 1, some less."""
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(n, d, generator=generator) * torch.tensor([0.1, 0.5, 1.5, 3.0])[:d] + 2
    z1 = z0 + 0.5 * torch.randn(n, d, generator=generator)
    return z0.requires_grad_(), z1.detach().requires_grad_()


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


class TestVicregLoss:
    @pytest.mark.parametrize(
        "weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    )
    def test_equals_the_equations_written_as_loops_in_value_and_gradient(
        self, weights: tuple[float, float, float]
    ) -> None:
        z0, z1 = embeddings()
        loss = vicreg_loss(
            z0, z1, similarity=weights[0], variance=weights[1], covariance=weights[2]
        )
        expected = vicreg_by_hand(z0, z1, *weights)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, [z0, z1])
        by_hand = torch.autograd.grad(expected, [z0, z1])
        for gradient, exact in zip(gradients, by_hand, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)

    def test_gradient_is_that_of_finite_differences(self) -> None:
        z0, z1 = (z.detach().double().requires_grad_() for z in embeddings())
        assert torch.autograd.gradcheck(lambda a, b: vicreg_loss(a, b, **PUBLISHED), (z0, z1))

    def test_equal_views_with_wide_uncorrelated_entries_give_zero(self) -> None:
        hadamard = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        assert vicreg_loss(hadamard, hadamard, **PUBLISHED).item() == pytest.approx(0.0, abs=1e-9)

    def test_collapsed_embeddings_give_the_whole_hinge(self) -> None:
        z = torch.full((8, 6), 3.0)
        loss = vicreg_loss(z, z, similarity=3.0, variance=5.0, covariance=7.0)
        assert loss.item() == pytest.approx(0.99 * 5)

    def test_entries_that_are_the_same_give_the_square_of_their_variance_for_each_pair(
        self,
    ) -> None:
        z = torch.randn(9, 1, generator=torch.Generator().manual_seed(0)) * 2
        loss = vicreg_loss(
            z.expand(9, 5), z.expand(9, 5), similarity=1.0, variance=1.0, covariance=0.5
        )
        assert loss.item() == pytest.approx(0.5 * 2 * 4 * z.var().item() ** 2, rel=1e-5)

    def test_a_constant_between_the_views_costs_its_square(self) -> None:
        z, _ = embeddings()
        loss = vicreg_loss(z, z + 3, similarity=2.0, variance=0.0, covariance=0.0)
        assert loss.item() == pytest.approx(2 * 9, rel=1e-5)

    def test_does_not_depend_on_the_order_of_images_views_or_entries(self) -> None:
        z0, z1 = (z.detach() for z in embeddings())
        loss = vicreg_loss(z0, z1, **PUBLISHED).item()
        order = torch.tensor([3, 0, 5, 4, 1, 2])
        for a, b in ((z0[order], z1[order]), (z1, z0), (z0.flip(1), z1.flip(1)), (z0 + 5, z1 + 5)):
            assert vicreg_loss(a, b, **PUBLISHED).item() == pytest.approx(loss, rel=1e-5)

    def test_embeddings_of_one_entry_have_no_pairs(self) -> None:
        z0, z1 = embeddings(d=1)
        found = vicreg_loss(z0, z1, **PUBLISHED).item()
        assert found == pytest.approx(vicreg_by_hand(z0, z1, 25.0, 25.0, 0.0).item(), rel=1e-5)

    def test_is_exact_under_autocast_and_for_half_precision(self) -> None:
        z0, z1 = embeddings()
        loss = vicreg_loss(z0, z1, **PUBLISHED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(vicreg_loss(z0, z1, **PUBLISHED), loss)
        half = [z.detach().bfloat16() for z in (z0, z1)]
        found = vicreg_loss(*half, **PUBLISHED)
        assert found.dtype == loss.dtype == torch.float32
        assert torch.equal(found, vicreg_loss(*(z.float() for z in half), **PUBLISHED))

    @pytest.mark.parametrize(
        ("shape0", "shape1", "message"),
        [
            ((5, 8), (5, 7), r"both be \(N, D\); got \(5, 8\), \(5, 7\)"),
            ((2, 3, 4), (2, 3, 4), r"got \(2, 3, 4\), \(2, 3, 4\)"),
            ((1, 8), (1, 8), r"2 images or more; z0 and z1 are \(1, 8\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shape0: tuple[int, ...], shape1: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            vicreg_loss(torch.zeros(shape0), torch.zeros(shape1), **PUBLISHED)


class TestVICReg:
    def test_loss_is_that_of_expanded_features_normed_one_view_at_a_time(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
        progress: Progress,
    ) -> None:
        config = VICRegConfig(
            hidden_dim=8, projection_dim=5, similarity=2.0, variance=3.0, covariance=4.0
        )
        method = VICReg(config, tiny_backbone(), training_set)
        views = make_views()
        output = method(batch_of(views), progress)
        z0, z1 = (method.projector(method.backbone(view)).detach() for view in views)
        expected = vicreg_by_hand(z0, z1, 2.0, 3.0, 4.0).item()
        assert output.loss.item() == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(output.features, method.encoder(views[0]).detach())

    def test_metrics_are_the_terms_and_the_spread_of_the_entries(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
        progress: Progress,
    ) -> None:
        method = VICReg(SMALL, tiny_backbone(), training_set)
        views = make_views()
        metrics = method(batch_of(views), progress).metrics
        z0, z1 = (method.projector(method.backbone(view)).detach() for view in views)
        spread = torch.cat([torch.sqrt(z.var(dim=0) + 1e-4) for z in (z0, z1)]).mean()
        assert metrics["vicreg/std"].item() == pytest.approx(spread.item(), rel=1e-4)
        for name, weights in (("invariance", (1.0, 0.0, 0.0)), ("covariance", (0.0, 0.0, 1.0))):
            expected = vicreg_by_hand(z0, z1, *weights).item()
            assert metrics[f"vicreg/{name}"].item() == pytest.approx(expected, rel=1e-3)

    def test_projector_is_the_papers_expander(
        self, tiny_backbone: Callable[..., Backbone], training_set: TrainingSet
    ) -> None:
        # Three linear layers, batch norm and ReLU after the first two (sec. 4.2).
        kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
        projector = VICReg(SMALL, tiny_backbone(), training_set).projector
        assert [type(layer) for layer in projector] == [*kinds, *kinds, nn.Linear]
        linear = [layer for layer in projector if isinstance(layer, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in linear] == [(6, 8), (8, 8), (8, 5)]
        assert (VICRegConfig().hidden_dim, VICRegConfig().projection_dim) == (8192, 8192)

    def test_refuses_batches_of_one_image(self) -> None:
        with pytest.raises(ConfigError, match=r"train\.global_batch_size=1, use 2 or more"):
            SMALL.check_shape(RunShape(1, 1, (32, 32), BackboneConfig()))
        SMALL.check_shape(RunShape(2, 1, (32, 32), BackboneConfig()))
