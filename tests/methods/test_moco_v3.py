import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.moco_v3 import MoCoV3, MoCoV3Config, moco_v3_loss
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.vit import VisionTransformer

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]

SMALL = MoCoV3Config(hidden_dim=10, projection_dim=4)


def moco_v3_by_hand(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Eq. (1), query by query, times 2 tau as in Algorithm 1, in float64."""
    q = [row / row.norm() for row in query.double()]
    k = [row / row.norm() for row in key.double()]
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(q):
        exponentials = [torch.exp(torch.dot(row, other) / temperature) for other in k]
        total = total - torch.log(exponentials[i] / sum(exponentials))
    return 2 * temperature * total / len(q)


def pair(n: int = 5, d: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(n, d)
    return query.requires_grad_(), query.detach() * 2 + 3 * torch.randn(n, d)


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


class TestMocoV3Loss:
    @pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
    @pytest.mark.parametrize("shape", [(5, 7), (33, 2)])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, shape: tuple[int, int], temperature: float
    ) -> None:
        query, key = pair(*shape)
        loss = moco_v3_loss(query, key, temperature=temperature)
        expected = moco_v3_by_hand(query, key, temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, query)
        (exact,) = torch.autograd.grad(expected, query)
        torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("n", [1, 2, 33])
    @pytest.mark.parametrize("temperature", [0.2, 1.0])
    def test_uniform_embeddings_give_two_tau_times_the_log_of_the_number_of_keys(
        self, n: int, temperature: float
    ) -> None:
        ones = torch.ones(n, 3)
        loss = moco_v3_loss(ones, ones, temperature=temperature).item()
        assert loss == pytest.approx(2 * temperature * math.log(n), abs=1e-6)

    @pytest.mark.parametrize("temperature", [0.2, 1.0])
    def test_orthogonal_images_with_equal_views_have_a_closed_form(
        self, temperature: float
    ) -> None:
        eye = torch.eye(6)
        expected = 2 * temperature * math.log(1 + 5 * math.exp(-1 / temperature))
        loss = moco_v3_loss(eye, eye, temperature=temperature).item()
        assert loss == pytest.approx(expected, rel=1e-5)

    def test_does_not_depend_on_lengths_or_on_the_order_of_images(self) -> None:
        query, key = pair()
        loss = moco_v3_loss(query, key, temperature=0.2).item()
        lengths = torch.tensor([0.1, 1.0, 3.0, 20.0, 0.5])[:, None]
        scaled = moco_v3_loss(query * lengths, key * 9, temperature=0.2).item()
        assert scaled == pytest.approx(loss, rel=1e-5)
        order = torch.tensor([3, 0, 4, 1, 2])
        assert moco_v3_loss(query[order], key[order], temperature=0.2).item() == pytest.approx(loss)
        assert moco_v3_loss(query, key[order], temperature=0.2).item() > loss + 0.1

    def test_no_gradient_goes_into_the_keys(self) -> None:
        query, key = pair()
        key.requires_grad_()
        moco_v3_loss(query, key, temperature=0.2).backward()
        assert key.grad is None
        assert query.grad is not None

    def test_gradient_is_right(self) -> None:
        query, key = (x.detach().double() for x in pair())
        assert torch.autograd.gradcheck(
            lambda x: moco_v3_loss(x, key, temperature=0.2), (query.requires_grad_(),)
        )

    def test_is_exact_under_autocast_and_of_half_precision_values(self) -> None:
        query, key = pair()
        loss = moco_v3_loss(query, key, temperature=0.05)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(moco_v3_loss(query, key, temperature=0.05), loss)
        half = query.bfloat16(), key.bfloat16()
        torch.testing.assert_close(
            moco_v3_loss(*half, temperature=0.05),
            moco_v3_loss(half[0].float(), half[1].float(), temperature=0.05),
        )

    @pytest.mark.parametrize(
        ("shape0", "shape1", "message"),
        [
            ((5, 8), (4, 8), r"query and key must both be \(N, D\); got \(5, 8\), \(4, 8\)"),
            ((5, 8), (5, 7), r"got \(5, 8\), \(5, 7\)"),
            ((8,), (8,), r"got \(8,\), \(8,\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, shape0: tuple[int, ...], shape1: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            moco_v3_loss(torch.zeros(shape0), torch.zeros(shape1), temperature=0.2)


class TestMoCoV3Config:
    def test_refuses_a_batch_of_one_image(self) -> None:
        def shape(batch: int) -> RunShape:
            return RunShape(batch, 1, (32, 32), BackboneConfig())

        MoCoV3Config().check_shape(shape(2))
        with pytest.raises(ConfigError, match=r"train\.global_batch_size=1, use 2 or more"):
            MoCoV3Config().check_shape(shape(1))


@pytest.fixture
def method(tiny_backbone: Backbones, training_set: TrainingSet) -> MoCoV3:
    method = MoCoV3(SMALL, tiny_backbone(), training_set)
    with torch.no_grad():  # a key encoder that differs from the query encoder, as it soon does
        for parameter in method.key_encoder.parameters():
            parameter.mul_(0.7).add_(0.02)
    return method


class TestMoCoV3:
    def test_loss_is_that_of_both_orders_added_with_each_view_normed_on_its_own(
        self, method: MoCoV3, make_views: Views, progress: Progress
    ) -> None:
        views = make_views()
        output = method(batch_of(views), progress)
        q = [method.predictor(method.query_encoder(view)) for view in views]
        k = [method.key_encoder(view) for view in views]
        expected = moco_v3_by_hand(q[0], k[1], 0.2) + moco_v3_by_hand(q[1], k[0], 0.2)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        together = method.predictor(method.query_encoder(torch.cat(views))).split(8)
        other = moco_v3_by_hand(together[0], k[1], 0.2) + moco_v3_by_hand(together[1], k[0], 0.2)
        assert output.loss.item() != pytest.approx(other.item(), rel=1e-3)

    def test_features_are_those_of_view_0_and_the_encoder_is_the_backbone_given(
        self,
        tiny_backbone: Backbones,
        training_set: TrainingSet,
        make_views: Views,
        progress: Progress,
    ) -> None:
        backbone = tiny_backbone()
        method = MoCoV3(SMALL, backbone, training_set)
        assert method.encoder is backbone
        views = make_views()
        features = method(batch_of(views), progress).features
        torch.testing.assert_close(features, backbone(views[0]).detach())

    def test_metrics_count_the_queries_that_find_their_key(
        self, method: MoCoV3, make_views: Views, progress: Progress
    ) -> None:
        batch = batch_of(make_views())
        embeddings = method.embeddings(batch, progress)
        _, q0, q1, k0, k1 = (nn.functional.normalize(x.detach(), dim=1) for x in embeddings)
        hits = [
            int(max(range(8), key=lambda j, q=q, k=k, i=i: float(q[i] @ k[j])) == i)
            for q, k in ((q0, k1), (q1, k0))
            for i in range(8)
        ]
        metrics = method.loss_of(embeddings, batch, progress).metrics
        assert metrics["moco_v3/partner_top1"].item() == pytest.approx(sum(hits) / 16)
        distance = (q0 - k1).square().sum(1).mean()
        assert metrics["moco_v3/alignment"].item() == pytest.approx(distance.item(), rel=1e-5)

    def test_keys_and_features_carry_no_gradient(
        self, method: MoCoV3, make_views: Views, progress: Progress
    ) -> None:
        embeddings = method.embeddings(batch_of(make_views()), progress)
        assert [x.requires_grad for x in embeddings] == [False, True, True, False, False]
        assert not any(p.requires_grad for p in method.key_encoder.parameters())


class TestHeads:
    def test_of_a_residual_network_are_those_of_the_authors_code(self, method: MoCoV3) -> None:
        block = ["Linear", "BatchNorm1d", "ReLU"]
        projector = method.query_encoder[1]
        assert [type(m).__name__ for m in projector] == [*block, "Linear", "BatchNorm1d"]
        assert not projector[-1].affine
        assert [type(m).__name__ for m in method.predictor] == [*block, "Linear"]
        linear = [m for m in [*projector, *method.predictor] if isinstance(m, nn.Linear)]
        assert all(m.bias is None for m in linear)
        widths = [(m.in_features, m.out_features) for m in linear]
        assert widths == [(6, 10), (10, 4), (4, 10), (10, 4)]

    def test_of_a_vision_transformer_are_those_of_the_authors_code(
        self, tiny_vit: Backbones, training_set: TrainingSet
    ) -> None:
        method = MoCoV3(SMALL, tiny_vit(), training_set)
        block = ["Linear", "BatchNorm1d", "ReLU"]
        projector = method.query_encoder[1]
        assert [type(m).__name__ for m in projector] == [*block, *block, "Linear", "BatchNorm1d"]
        assert [type(m).__name__ for m in method.predictor] == [*block, "Linear", "BatchNorm1d"]
        assert not projector[-1].affine
        assert not method.predictor[-1].affine

    def test_may_have_another_number_of_layers(
        self, tiny_backbone: Backbones, training_set: TrainingSet
    ) -> None:
        config = SMALL.model_copy(update={"projection_layers": 1})
        projector = MoCoV3(config, tiny_backbone(), training_set).query_encoder[1]
        assert [type(m).__name__ for m in projector] == ["Linear", "BatchNorm1d"]


class TestPatchProjection:
    def test_is_frozen_and_everything_else_learns(
        self,
        tiny_vit: Backbones,
        training_set: TrainingSet,
        make_views: Views,
        progress: Progress,
    ) -> None:
        method = MoCoV3(SMALL, tiny_vit(), training_set)
        net = method.encoder.net
        assert isinstance(net, VisionTransformer)
        batch = batch_of(make_views(size=32))
        method(batch, progress).loss.backward()
        for name, parameter in method.encoder.named_parameters():
            frozen = name.startswith("net.patch_embed.")
            assert parameter.requires_grad != frozen, name
            assert (parameter.grad is None) == frozen, name
        drawn = net.patch_embed.proj.weight.clone()
        method.after_optimizer_step(progress)
        assert torch.equal(method.key_encoder[0].net.patch_embed.proj.weight, drawn)

    def test_learns_if_so_configured(self, tiny_vit: Backbones, training_set: TrainingSet) -> None:
        config = SMALL.model_copy(update={"freeze_patch_projection": False})
        method = MoCoV3(config, tiny_vit(), training_set)
        assert all(p.requires_grad for p in method.encoder.parameters())


class TestKeyEncoder:
    def test_moves_as_in_the_authors_code_at_the_start_of_each_step(
        self, tiny_backbone: Backbones, training_set: TrainingSet, make_views: Views
    ) -> None:
        """There, m is 1 - (1 - m_0) (1 + cos(pi i / K)) / 2 and keys are made after the move."""
        steps = 4
        config = SMALL.model_copy(update={"ema_momentum": 0.5})
        method = MoCoV3(config, tiny_backbone(), training_set)
        theirs = copy.deepcopy(method.key_encoder)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
        for step in range(steps):
            m = 1 - 0.5 * (1 + math.cos(math.pi * step / steps)) * (1 - 0.5)
            online = method.query_encoder.parameters()
            for key, query in zip(theirs.parameters(), online, strict=True):
                key.data = key.data * m + query.data * (1 - m)
            pairs = zip(method.key_encoder.parameters(), theirs.parameters(), strict=True)
            assert all(torch.allclose(ours, expected, atol=1e-6) for ours, expected in pairs)

            progress = Progress(step, steps, 2, seed=0)
            optimizer.zero_grad()
            output = method(batch_of(make_views(seed=step)), progress)
            output.loss.backward()
            optimizer.step()
            method.after_optimizer_step(progress)
            following = 1 - 0.5 * (1 + math.cos(math.pi * (step + 1) / steps)) * (1 - 0.5)
            assert output.metrics["moco_v3/ema_momentum"].item() == pytest.approx(following)

    def test_norms_by_its_own_batch_and_never_by_running_statistics(
        self, method: MoCoV3, make_views: Views, progress: Progress
    ) -> None:
        batch = batch_of(make_views())
        loss = method(batch, progress).loss
        norm = method.key_encoder[1][1]
        norm.running_mean.fill_(50.0)
        norm.running_var.fill_(1e-3)
        torch.testing.assert_close(method(batch, progress).loss, loss)
