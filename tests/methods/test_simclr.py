import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.methods.simclr import SimCLR, SimCLRConfig, nt_xent_loss
from raysl.nn.backbones import Backbone

TRAINING_SET = TrainingSet(num_images=64, global_batch_size=8, view_sizes_px=(8, 8))


def as_batch(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


def nt_xent_by_hand(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """Eq. (1) as the paper writes it: loops and a sum over k != i, in float64."""
    z = [row / row.norm() for row in torch.cat([z0.double(), z1.double()])]
    n = len(z0)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        similarity = [torch.dot(z[i], z[k]) / temperature for k in range(2 * n)]
        denominator = sum(torch.exp(s) for k, s in enumerate(similarity) if k != i)
        total = total - torch.log(torch.exp(similarity[(i + n) % (2 * n)]) / denominator)
    return total / (2 * n)


def projections(n: int = 5, d: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z0 = torch.randn(n, d)
    return z0.requires_grad_(), (z0 * 2 + 3 * torch.randn(n, d)).detach().requires_grad_()


class TestNtXentLoss:
    @pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 1.0])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, temperature: float
    ) -> None:
        z0, z1 = projections()
        loss = nt_xent_loss(z0, z1, temperature=temperature)
        expected = nt_xent_by_hand(z0, z1, temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, [z0, z1])
        by_hand = torch.autograd.grad(expected, [z0, z1])
        for gradient, exact in zip(gradients, by_hand, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6 / temperature)

    @pytest.mark.parametrize("n", [2, 4, 33])
    def test_uniform_embeddings_give_log_of_the_number_of_candidates(self, n: int) -> None:
        z = torch.ones(n, 3)
        assert nt_xent_loss(z, z, temperature=0.1).item() == pytest.approx(math.log(2 * n - 1))

    @pytest.mark.parametrize("temperature", [0.2, 1.0])
    def test_orthogonal_images_with_equal_views_have_a_closed_form(
        self, temperature: float
    ) -> None:
        z = torch.eye(6)
        expected = math.log(1 + (2 * 6 - 2) * math.exp(-1 / temperature))
        assert nt_xent_loss(z, z, temperature=temperature).item() == pytest.approx(expected)

    def test_does_not_depend_on_the_order_of_images_or_views(self) -> None:
        z0, z1 = projections()
        loss = nt_xent_loss(z0, z1, temperature=0.1).item()
        order = torch.tensor([3, 0, 4, 1, 2])
        assert nt_xent_loss(z0[order], z1[order], temperature=0.1).item() == pytest.approx(loss)
        assert nt_xent_loss(z1, z0, temperature=0.1).item() == pytest.approx(loss)

    def test_depends_on_which_views_are_partners(self) -> None:
        z0, z1 = projections()
        wrong = nt_xent_loss(z0, z1.roll(1, dims=0), temperature=0.1)
        assert wrong > nt_xent_loss(z0, z1, temperature=0.1) + 1

    def test_does_not_depend_on_the_length_of_an_embedding(self) -> None:
        z0, z1 = projections()
        lengths = torch.tensor([0.1, 1.0, 3.0, 20.0, 0.5])[:, None]
        scaled = nt_xent_loss(z0 * lengths, z1 * 9, temperature=0.1).item()
        assert scaled == pytest.approx(nt_xent_loss(z0, z1, temperature=0.1).item(), rel=1e-5)

    def test_is_exact_under_autocast(self) -> None:
        z0, z1 = projections()
        loss = nt_xent_loss(z0, z1, temperature=0.05)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = nt_xent_loss(z0, z1, temperature=0.05)
        assert torch.equal(under_autocast, loss)
        assert loss.dtype == torch.float32

    def test_half_precision_embeddings_give_the_float32_loss_of_their_values(self) -> None:
        z0, z1 = (z.detach().bfloat16() for z in projections())
        loss = nt_xent_loss(z0, z1, temperature=0.1)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, nt_xent_loss(z0.float(), z1.float(), temperature=0.1))

    @pytest.mark.parametrize(
        ("shape0", "shape1", "message"),
        [
            ((5, 8), (4, 8), r"got \(5, 8\), \(4, 8\)"),
            ((5, 8), (5, 7), r"got \(5, 8\), \(5, 7\)"),
            ((8,), (8,), r"must both be \(N, D\); got \(8,\), \(8,\)"),
            ((2, 3, 4), (2, 3, 4), r"got \(2, 3, 4\), \(2, 3, 4\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shape0: tuple[int, ...], shape1: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            nt_xent_loss(torch.zeros(shape0), torch.zeros(shape1), temperature=0.1)


class TestSimCLR:
    def test_loss_is_nt_xent_of_projections_of_both_views_normed_together(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        progress: Progress,
    ) -> None:
        method = SimCLR(
            SimCLRConfig(temperature=0.3, projection_dim=4), tiny_backbone(), TRAINING_SET
        )
        views = make_views()
        output = method(as_batch(views), progress)
        together = method.projector(method.backbone(torch.cat(views)))
        assert output.loss.item() == pytest.approx(
            nt_xent_by_hand(*together.detach().split(8), 0.3).item(), rel=1e-5
        )
        apart = [method.projector(method.backbone(view)).detach() for view in views]
        assert output.loss.item() != pytest.approx(nt_xent_by_hand(*apart, 0.3).item(), rel=1e-3)

    def test_features_are_those_of_view_0_before_the_head(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        progress: Progress,
    ) -> None:
        method = SimCLR(SimCLRConfig(), tiny_backbone(batch_norm=False), TRAINING_SET)
        views = make_views()
        features = method(as_batch(views), progress).features
        torch.testing.assert_close(features, method.encoder(views[0]).detach())

    def test_partner_top1_counts_the_rows_whose_nearest_is_their_partner(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        progress: Progress,
    ) -> None:
        method = SimCLR(SimCLRConfig(projection_dim=4), tiny_backbone(), TRAINING_SET)
        view = make_views()[0]
        found = method(as_batch([view, view]), progress).metrics["simclr/partner_top1"]
        assert found.item() == 1.0

        views = make_views()
        z = F.normalize(method.projector(method.backbone(torch.cat(views))), dim=1).detach()
        hits = 0
        for i in range(16):
            others = [(float(z[i] @ z[k]), k) for k in range(16) if k != i]
            hits += max(others)[1] == (i + 8) % 16
        output = method(as_batch(views), progress)
        assert output.metrics["simclr/partner_top1"].item() == pytest.approx(hits / 16)

    def test_head_follows_the_configuration(self, tiny_backbone: Callable[..., Backbone]) -> None:
        def widths(**settings: int) -> list[tuple[int, int]]:
            head = SimCLR(SimCLRConfig(**settings), tiny_backbone(), TRAINING_SET).projector
            linear = [m for m in head if isinstance(m, nn.Linear)]
            return [(m.in_features, m.out_features) for m in linear]

        assert widths(projection_dim=5) == [(6, 6), (6, 5)]  # hidden: the encoder's width
        assert widths(projection_dim=5, hidden_dim=9, projection_layers=3) == [
            (6, 9),
            (9, 9),
            (9, 5),
        ]

    def test_encoder_is_the_backbone_it_was_given(
        self, tiny_backbone: Callable[..., Backbone]
    ) -> None:
        backbone = tiny_backbone()
        assert SimCLR(SimCLRConfig(), backbone, TRAINING_SET).encoder is backbone


class TestMemory:
    """Version 2's negatives from a moving average of the network."""

    def build(self, backbone: Backbone, **settings: Any) -> SimCLR:
        settings = {"memory": True, "memory_length": 16, "ema_momentum": 0.9} | settings
        torch.manual_seed(5)
        return SimCLR(SimCLRConfig(projection_dim=4, **settings), backbone, TRAINING_SET)

    def train_step(self, method: SimCLR, views: list[Tensor], step: int) -> Tensor:
        progress = Progress(step, 20, 5, seed=7)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
        output = method(as_batch(views), progress)
        output.loss.backward()
        optimizer.step()
        method.after_optimizer_step(progress)
        return output.loss.detach()

    def test_is_off_unless_asked_for(self, tiny_backbone: Callable[..., Backbone]) -> None:
        assert SimCLRConfig().size_defaults(TRAINING_SET) == {}
        assert SimCLR(SimCLRConfig(), tiny_backbone(), TRAINING_SET).memory is None

    def test_adds_negatives_to_every_row_and_nothing_else(
        self, tiny_backbone: Callable[..., Backbone], make_views: Callable[..., list[Tensor]]
    ) -> None:
        method = self.build(tiny_backbone())
        for step in range(2):
            self.train_step(method, make_views(seed=step), step)
        views = make_views(seed=5)
        z = F.normalize(method.projector(method.backbone(torch.cat(views))).detach(), dim=1)
        assert method.memory is not None
        total = 0.0
        for i in range(16):
            others = [z[k] for k in range(16) if k != i] + list(method.memory.keys)
            denominator = sum(math.exp(float(z[i] @ other) / 0.1) for other in others)
            total -= math.log(math.exp(float(z[i] @ z[(i + 8) % 16]) / 0.1) / denominator)
        output = method(as_batch(views), Progress(2, 20, 5, seed=7))
        assert output.loss.item() == pytest.approx(total / 16, rel=1e-5)
        assert output.metrics["simclr/memory_age_steps"].item() == 2.0

    def test_holds_what_the_memory_network_made_of_view_1_from_the_next_step_on(
        self, tiny_backbone: Callable[..., Backbone], make_views: Callable[..., list[Tensor]]
    ) -> None:
        method = self.build(tiny_backbone(batch_norm=False))
        network, memory = method.memory_network, method.memory
        assert network is not None
        assert memory is not None
        for step in range(3):
            views = make_views(seed=step)
            before = [p.clone() for p in network.parameters()]
            with torch.no_grad():
                expected = F.normalize(network(views[1]), dim=1)
            self.train_step(method, views, step)
            torch.testing.assert_close(memory.keys[8 * (step % 2) :][:8], expected)
            online = [*method.backbone.parameters(), *method.projector.parameters()]
            for new, old, target in zip(network.parameters(), before, online, strict=True):
                torch.testing.assert_close(new, 0.9 * old + 0.1 * target.detach())

    def test_is_as_long_as_the_data_set_by_default_and_never_longer(
        self, tiny_backbone: Callable[..., Backbone]
    ) -> None:
        config = SimCLRConfig(memory=True)
        default = config.size_defaults(TRAINING_SET)["memory_length"]
        assert default == (64, "min(65,536, 64 images) = 64")
        method = self.build(tiny_backbone(), memory_length=None)
        assert method.memory is not None
        assert len(method.memory.keys) == 64
        with pytest.raises(ConfigError, match=r"memory_length=65 is more than the 64 training im"):
            self.build(tiny_backbone(), memory_length=65)
