import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.margin import Margin, MarginConfig, _partners, margin_loss
from raysl.nn.backbones import Backbone, BackboneConfig

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]


def margin_by_hand(z0: Tensor, z1: Tensor, dissimilar: Tensor, margin: float) -> Tensor:
    """Eq. (4) as the paper writes it: one pair after the other, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b, y in zip(z0.double(), z1.double(), dissimilar.tolist(), strict=True):
        distance = torch.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))
        apart = margin - distance if margin > distance else 0 * distance
        total = total + (1 - y) * distance**2 / 2 + y * apart**2 / 2
    return total / len(z0)


def pairs(n: int = 12, d: int = 5, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(n, d, generator=generator, dtype=dtype)
    z1 = z0 + torch.linspace(0.05, 1.2, n, dtype=dtype)[:, None] * torch.randn(
        n, d, generator=generator, dtype=dtype
    )
    dissimilar = torch.arange(n) % 2
    return z0.requires_grad_(), z1.requires_grad_(), dissimilar


class TestMarginLoss:
    @pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, margin: float
    ) -> None:
        z0, z1, dissimilar = pairs()
        loss = margin_loss(z0, z1, dissimilar, margin=margin)
        expected = margin_by_hand(z0, z1, dissimilar, margin)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, [z0, z1])
        by_hand = torch.autograd.grad(expected, [z0, z1])
        for gradient, exact in zip(gradients, by_hand, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6, check_dtype=False)

    @pytest.mark.parametrize(
        ("distance", "similar", "dissimilar"), [(0.0, 0.0, 2.0), (0.5, 0.125, 1.125), (3, 4.5, 0)]
    )
    def test_one_pair_has_a_closed_form(
        self, distance: float, similar: float, dissimilar: float
    ) -> None:
        z0, z1 = torch.zeros(1, 4), torch.tensor([[0.0, distance, 0.0, 0.0]])
        for y, expected in ((0, similar), (1, dissimilar)):
            loss = margin_loss(z0, z1, torch.tensor([y]), margin=2.0)
            assert loss.item() == pytest.approx(expected)

    def test_does_not_depend_on_the_order_in_a_pair_or_of_pairs_or_on_origin_and_rotation(
        self,
    ) -> None:
        z0, z1, dissimilar = (x.detach() for x in pairs())
        loss = margin_loss(z0, z1, dissimilar, margin=1.5).item()
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))
        for a, b, y in (
            (z1, z0, dissimilar),
            (z0[order], z1[order], dissimilar[order]),
            (z0 @ turn + 3, z1 @ turn + 3, dissimilar),
        ):
            assert margin_loss(a, b, y, margin=1.5).item() == pytest.approx(loss, rel=1e-5)

    def test_scales_with_the_square_of_embeddings_and_margin_together(self) -> None:
        z0, z1, dissimilar = pairs()
        loss = margin_loss(z0, z1, dissimilar, margin=1.5).item()
        scaled = margin_loss(4 * z0, 4 * z1, dissimilar, margin=6.0).item()
        assert scaled == pytest.approx(16 * loss, rel=1e-5)

    def test_gradient_is_that_of_finite_differences(self) -> None:
        z0, z1, dissimilar = pairs(dtype=torch.float64)
        torch.autograd.gradcheck(
            lambda a, b: margin_loss(a, b, dissimilar, margin=1.5), (z0, z1), atol=1e-8
        )

    def test_gradient_draws_similar_pairs_together_and_pushes_near_ones_apart(self) -> None:
        z0 = torch.zeros(3, 2, requires_grad=True)
        z1 = torch.tensor([[0.5, 0.0], [0.5, 0.0], [5.0, 0.0]])
        (gradient,) = torch.autograd.grad(
            margin_loss(z0, z1, torch.tensor([0, 1, 1]), margin=2.0), z0
        )
        torch.testing.assert_close(3 * gradient[:, 0], torch.tensor([-0.5, 1.5, 0.0]))

    @pytest.mark.parametrize("offset", [0.0, 1e-30, 1e-20, 1e-8])
    def test_gradient_is_finite_at_and_near_distance_0(self, offset: float) -> None:
        z0 = torch.zeros(2, 3, requires_grad=True)
        loss = margin_loss(z0, torch.full((2, 3), offset), torch.tensor([0, 1]), margin=1.0)
        (gradient,) = torch.autograd.grad(loss, z0)
        assert gradient.isfinite().all()
        assert gradient.abs().max() <= 0.5  # half of the margin: the mean of two pairs
        assert loss.item() == pytest.approx(0.25, rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float16])
    def test_takes_y_of_any_type(self, dtype: torch.dtype) -> None:
        z0, z1, dissimilar = pairs()
        loss = margin_loss(z0, z1, dissimilar, margin=1.0)
        assert torch.equal(margin_loss(z0, z1, dissimilar.to(dtype), margin=1.0), loss)

    def test_is_exact_under_autocast_and_float32_for_half_precision(self) -> None:
        z0, z1, dissimilar = pairs()
        loss = margin_loss(z0, z1, dissimilar, margin=1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(margin_loss(z0, z1, dissimilar, margin=1.0), loss)
        half = margin_loss(z0.bfloat16(), z1.bfloat16(), dissimilar, margin=1.0)
        assert half.dtype == torch.float32
        assert half == margin_loss(
            z0.bfloat16().float(), z1.bfloat16().float(), dissimilar, margin=1.0
        )

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((5, 8), (4, 8), (5,)), r"got \(5, 8\), \(4, 8\), \(5,\)"),
            (((5, 8), (5, 8), (4,)), r"\(N, D\) and dissimilar \(N,\); got .*\(4,\)"),
            (((5, 8), (5, 8), (5, 1)), r"got \(5, 8\), \(5, 8\), \(5, 1\)"),
            (((5,), (5,), (5,)), r"got \(5,\), \(5,\), \(5,\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shapes: tuple[tuple[int, ...], ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            margin_loss(*(torch.zeros(shape) for shape in shapes), margin=1.0)


class TestPartners:
    def draw(self, n: int, num_others: int, seed: int = 0) -> Tensor:
        return _partners(n, num_others, generator=torch.Generator().manual_seed(seed))

    @pytest.mark.parametrize(("n", "num_others"), [(2, 1), (7, 3), (8, 7), (5, 40)])
    def test_are_different_images_and_never_the_image_itself(self, n: int, num_others: int) -> None:
        for seed in range(20):
            partner = self.draw(n, num_others, seed)
            assert partner.shape == (n, min(num_others, n - 1))
            for image, others in enumerate(partner.tolist()):
                assert image not in others
                assert len(set(others)) == len(others)
                assert set(others) <= set(range(n))

    def test_every_image_is_a_partner_equally_often(self) -> None:
        counts = torch.bincount(self.draw(9, 4).flatten(), minlength=9)
        assert counts.tolist() == [4] * 9

    def test_every_other_image_is_drawn_equally_likely(self) -> None:
        drawn = torch.stack([self.draw(4, 1, seed)[0, 0] for seed in range(3000)])
        share = torch.bincount(drawn, minlength=4) / 3000
        torch.testing.assert_close(share, torch.tensor([0, 1, 1, 1]) / 3, atol=0.03, rtol=0)

    def test_one_image_has_none(self) -> None:
        assert self.draw(1, 3).shape == (1, 0)


@pytest.fixture
def build(tiny_backbone: Backbones, training_set: TrainingSet) -> Callable[..., Margin]:
    def build(*, backbone: Backbone | None = None, **settings: object) -> Margin:
        torch.manual_seed(0)
        config = MarginConfig.model_validate({"projection_dim": 4, "num_others": 3} | settings)
        data = training_set._replace(class_counts=(32, 32))
        return Margin(config, backbone or tiny_backbone(batch_norm=False), data)

    return build


def as_batch(views: list[Tensor], labels: list[int] | None = None) -> Batch:
    known = None if labels is None else torch.tensor(labels)
    return Batch(views, torch.arange(len(views[0])), known)


def embedded(method: Margin, view: Tensor) -> Tensor:
    z = method.projector(method.backbone(view)).detach()
    return F.normalize(z, dim=1) if method.config.normalize else z


class TestMargin:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_loss_is_that_of_own_views_and_of_drawn_others(
        self, build: Callable[..., Margin], make_views: Views, progress: Progress, normalize: bool
    ) -> None:
        method = build(normalize=normalize, margin=0.4)
        views = make_views()
        output = method(as_batch(views), progress)
        z0, z1 = (embedded(method, view) for view in views)
        partner = _partners(8, 3, generator=progress.shared_generator())
        rows = [(i, i, 0) for i in range(8)]
        rows += [(i, int(j), 1) for i in range(8) for j in partner[i]]
        left, right, y = (torch.tensor(column) for column in zip(*rows, strict=True))
        expected = margin_by_hand(z0[left], z1[right], y, 0.4)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        distance = (z0[left] - z1[right]).norm(dim=1)
        metrics = {key: value.item() for key, value in output.metrics.items()}
        assert metrics == pytest.approx(
            {
                "margin/similar_distance": distance[:8].mean().item(),
                "margin/dissimilar_distance": distance[8:].mean().item(),
                "margin/inside_share": (distance[8:] < 0.4).float().mean().item(),
            },
            rel=1e-5,
        )

    def test_with_labels_images_of_one_class_are_similar_and_unknown_ones_to_themselves_alone(
        self, build: Callable[..., Margin], make_views: Views, progress: Progress
    ) -> None:
        method = build(pairs="labels", num_others=7, margin=0.4)
        views = make_views()
        labels = [0, 0, 1, 1, 1, -1, -1, 0]
        output = method(as_batch(views, labels), progress)
        z0, z1 = (embedded(method, view) for view in views)
        rows = [(i, j) for i in range(8) for j in range(8)]  # each with all others and itself
        y = [int(i != j and (labels[i] != labels[j] or labels[i] < 0)) for i, j in rows]
        assert sum(y) == 64 - 8 - 6 - 6
        left, right = (torch.tensor(column) for column in zip(*rows, strict=True))
        expected = margin_by_hand(z0[left], z1[right], torch.tensor(y), 0.4)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_without_being_asked_labels_change_nothing(
        self, build: Callable[..., Margin], make_views: Views, progress: Progress
    ) -> None:
        losses = [
            build()(as_batch(make_views(), labels), progress).loss for labels in (None, [0] * 8)
        ]
        assert torch.equal(*losses)

    def test_labels_that_are_all_unknown_are_no_labels(
        self, build: Callable[..., Margin], make_views: Views, progress: Progress
    ) -> None:
        unknown = build(pairs="labels")(as_batch(make_views(), [-1] * 8), progress)
        assert torch.equal(unknown.loss, build()(as_batch(make_views()), progress).loss)

    def test_pairs_are_others_in_the_next_step(
        self, build: Callable[..., Margin], make_views: Views, progress: Progress
    ) -> None:
        method, batch = build(margin=100.0), as_batch(make_views())
        first, again = (method(batch, progress).loss for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, method(batch, progress._replace(step=4)).loss)

    def test_a_single_image_has_the_distance_of_its_views_as_loss(
        self, build: Callable[..., Margin], make_views: Views, progress: Progress
    ) -> None:
        output = build()(as_batch(make_views(1)), progress)
        distance = output.metrics["margin/similar_distance"]
        assert output.loss.item() == pytest.approx(distance.item() ** 2 / 2)
        assert output.metrics["margin/inside_share"] == 0

    def test_features_are_those_of_view_0_before_the_head(
        self, build: Callable[..., Margin], make_views: Views, progress: Progress
    ) -> None:
        method, views = build(), make_views()
        features = method(as_batch(views), progress).features
        torch.testing.assert_close(features, method.encoder(views[0]).detach())

    def test_head_has_no_batch_norm_and_no_origin_of_its_own(
        self, build: Callable[..., Margin]
    ) -> None:
        head = build(projection_layers=3, hidden_dim=9).projector
        linear = [m for m in head if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in linear] == [(6, 9), (9, 9), (9, 4)]
        assert not any(isinstance(m, nn.BatchNorm1d) for m in head)
        assert [m.bias.requires_grad for m in linear] == [True, True, False]

    def test_learns_to_keep_images_apart_by_the_margin(
        self, build: Callable[..., Margin], make_views: Views, progress: Progress
    ) -> None:
        """From a view alone: twins stay together, others end at the margin or beyond."""
        method = build(num_others=7, margin=2.0)
        view = make_views()[0]
        optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.02)
        for _ in range(150):
            output = method(as_batch([view, view]), progress)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        assert output.loss.item() < 0.05
        assert output.metrics["margin/similar_distance"] == 0
        assert output.metrics["margin/dissimilar_distance"] > 1.9


class TestConfig:
    def shape(self, batch: int) -> RunShape:
        return RunShape(batch, 1, (32, 32), BackboneConfig())

    def test_more_partners_than_a_batch_has_are_refused(self) -> None:
        MarginConfig(num_others=7).check_shape(self.shape(8))
        message = r"method.num_others=8: an image has 7 others in train.global_batch_size=8"
        with pytest.raises(ConfigError, match=message):
            MarginConfig(num_others=8).check_shape(self.shape(8))

    def test_a_margin_wider_than_the_sphere_is_refused(self) -> None:
        MarginConfig(margin=2.0, normalize=True).check_shape(self.shape(16))
        MarginConfig(margin=2.5).check_shape(self.shape(16))
        with pytest.raises(ConfigError, match=r"method.margin=2.5: .*at most 2 apart"):
            MarginConfig(margin=2.5, normalize=True).check_shape(self.shape(16))

    def test_pairs_from_labels_need_labels(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        with pytest.raises(ConfigError, match=r"method.pairs=labels: data.source has no labels"):
            Margin(MarginConfig(pairs="labels"), tiny_backbone(), training_set)


def test_the_loss_of_random_directions_is_what_their_distance_of_sqrt_2_gives() -> None:
    """Why a margin of 1 on the sphere leaves most images alone, and 2 none."""
    generator = torch.Generator().manual_seed(0)
    z0, z1 = (F.normalize(torch.randn(500, 256, generator=generator), dim=1) for _ in range(2))
    everything = torch.ones(500)
    assert margin_loss(z0, z1, everything, margin=1.0).item() == pytest.approx(0.0, abs=1e-6)
    expected = (2 - math.sqrt(2)) ** 2 / 2
    assert margin_loss(z0, z1, everything, margin=2.0).item() == pytest.approx(expected, rel=0.02)
