import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.config.base import Duration
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.swav import SwAV, SwAVConfig, sinkhorn_codes, swav_loss
from raysl.nn.backbones import Backbone, BackboneConfig

NOW = Duration(steps=0)
SMALL = SwAVConfig(hidden_dim=8, projection_dim=4, num_prototypes=5, frozen=NOW)


def swav_by_hand(scores: list[Tensor], codes: list[Tensor], temperature: float) -> Tensor:
    """Eq. (2) and (6) as loops in float64, averaged over the pairs of views and the images."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for i, code in enumerate(codes):
        for v, score in enumerate(scores):
            if v == i:
                continue
            pairs += 1
            for n in range(len(score)):
                exponents = [torch.exp(s.double() / temperature) for s in score[n]]
                for k, exponent in enumerate(exponents):
                    p = exponent / sum(exponents)
                    total = total - code[n, k].double() * torch.log(p) / len(score)
    return total / pairs


def codes_by_hand(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp as the paper says it: Q is K x B, rows to sum to 1/K, columns to 1/B."""
    q = torch.exp(scores.double() / epsilon).T
    q = q / q.sum()
    num_prototypes, batch = q.shape
    for _ in range(iterations):
        for k in range(num_prototypes):
            q[k] = q[k] / q[k].sum() / num_prototypes
        for b in range(batch):
            q[:, b] = q[:, b] / q[:, b].sum() / batch
    return (q / q.sum(dim=0)).T


def cosines(n: int = 6, k: int = 4, *, seed: int = 0) -> Tensor:
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_codes(n: int = 6, k: int = 4, *, seed: int = 9) -> Tensor:
    return cosines(n, k, seed=seed).mul(3).softmax(dim=1)


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


def at(step: int) -> Progress:
    return Progress(step=step, total_steps=20, steps_per_epoch=5, seed=7)


class TestSwavLoss:
    @pytest.mark.parametrize("num_views", [2, 5])
    @pytest.mark.parametrize("temperature", [0.1, 1.0])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, num_views: int, temperature: float
    ) -> None:
        scores = [cosines(seed=v).requires_grad_() for v in range(num_views)]
        codes = [some_codes(seed=8), some_codes(seed=9)]
        loss = swav_loss(scores, codes, temperature=temperature)
        expected = swav_by_hand(scores, codes, temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, scores)
        by_hand = torch.autograd.grad(expected, scores)
        for gradient, exact in zip(gradients, by_hand, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)

    def test_gradient_is_that_of_finite_differences(self) -> None:
        scores = [cosines(seed=v).double().requires_grad_() for v in range(3)]
        codes = [some_codes().double()]
        assert torch.autograd.gradcheck(
            lambda *given: swav_loss(given, codes, temperature=0.5), scores
        )

    def test_equal_scores_give_the_logarithm_of_the_number_of_prototypes(self) -> None:
        scores = [torch.full((6, 4), 0.3)] * 3
        loss = swav_loss(scores, [some_codes(), some_codes(seed=1)], temperature=0.1)
        assert loss.item() == pytest.approx(math.log(4))

    def test_a_prediction_that_equals_the_code_gives_its_entropy(self) -> None:
        score, code = cosines(), cosines().div(0.2).softmax(dim=1)
        loss = swav_loss([score, score], [code, code], temperature=0.2)
        entropy = -(code * code.log()).sum(dim=1).mean()
        assert loss.item() == pytest.approx(entropy.item(), rel=1e-5)

    def test_no_view_predicts_its_own_code(self) -> None:
        scores = [cosines(seed=v).requires_grad_() for v in range(3)]
        swav_loss(scores, [some_codes()], temperature=0.1).backward()
        assert scores[0].grad is None
        assert all(score.grad is not None for score in scores[1:])

    def test_does_not_depend_on_the_order_of_images_prototypes_or_small_views(self) -> None:
        scores, codes = [cosines(seed=v) for v in range(4)], [some_codes(), some_codes(seed=1)]
        loss = swav_loss(scores, codes, temperature=0.1).item()

        def found(scores: list[Tensor], codes: list[Tensor]) -> float:
            return swav_loss(scores, codes, temperature=0.1).item()

        order = torch.tensor([3, 0, 5, 4, 1, 2])
        assert found([s[order] for s in scores], [c[order] for c in codes]) == pytest.approx(loss)
        assert found([s.flip(1) for s in scores], [c.flip(1) for c in codes]) == pytest.approx(loss)
        assert found([*scores[:2], scores[3], scores[2]], codes) == pytest.approx(loss)
        assert found([scores[1], scores[0], *scores[2:]], codes[::-1]) == pytest.approx(loss)
        assert found([scores[1], scores[0], *scores[2:]], codes) != pytest.approx(loss, rel=1e-3)

    def test_is_exact_under_autocast_and_for_half_precision(self) -> None:
        scores, codes = [cosines(), cosines(seed=1)], [some_codes()]
        loss = swav_loss(scores, codes, temperature=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(swav_loss(scores, codes, temperature=0.1), loss)
        half = [s.bfloat16() for s in scores]
        found = swav_loss(half, codes, temperature=0.1)
        assert found.dtype == loss.dtype == torch.float32
        assert torch.equal(found, swav_loss([s.float() for s in half], codes, temperature=0.1))

    def test_says_what_it_got(self) -> None:
        with pytest.raises(ShapeError, match=r"2 views or more .* got 1 and 1"):
            swav_loss([cosines()], [some_codes()], temperature=0.1)
        with pytest.raises(ShapeError, match="got 2 and 0"):
            swav_loss([cosines()] * 2, [], temperature=0.1)
        with pytest.raises(ShapeError, match=r"all be \(N, K\); got \[\(5, 4\), \(6, 4\)\]"):
            swav_loss([cosines(), cosines(5)], [some_codes()], temperature=0.1)


class TestSinkhornCodes:
    @pytest.mark.parametrize("epsilon", [0.05, 1.0])
    @pytest.mark.parametrize("iterations", [0, 1, 3, 20])
    def test_equals_the_algorithm_written_as_loops(self, epsilon: float, iterations: int) -> None:
        found = sinkhorn_codes(cosines(), epsilon=epsilon, iterations=iterations)
        expected = codes_by_hand(cosines(), epsilon, iterations).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    def test_every_image_sums_to_one_and_in_the_end_every_prototype_to_as_much(self) -> None:
        codes = sinkhorn_codes(cosines(12, 4).double(), epsilon=0.5, iterations=100)
        torch.testing.assert_close(codes.sum(dim=1), torch.ones(12).double())
        torch.testing.assert_close(codes.sum(dim=0), torch.full((4,), 3.0).double())

    def test_images_that_are_all_nearest_to_one_prototype_are_shared_out(self) -> None:
        scores = 0.1 * cosines(40, 4) + torch.tensor([0.9, 0, 0, 0])
        assert scores.argmax(dim=1).unique().tolist() == [0]
        codes = sinkhorn_codes(scores, epsilon=0.05, iterations=3)
        assert codes.argmax(dim=1).bincount(minlength=4).min() > 3

    def test_a_prototype_that_all_images_like_better_by_as_much_gets_no_more(self) -> None:
        scores = cosines()
        moved = scores + torch.tensor([0.4, 0, -0.2, 0])
        torch.testing.assert_close(
            sinkhorn_codes(moved, epsilon=0.1, iterations=50),
            sinkhorn_codes(scores, epsilon=0.1, iterations=50),
        )

    def test_equal_scores_give_uniform_codes(self) -> None:
        codes = sinkhorn_codes(torch.zeros(7, 4), epsilon=0.05, iterations=3)
        torch.testing.assert_close(codes, torch.full((7, 4), 0.25))

    def test_no_epsilon_is_too_small(self) -> None:
        codes = sinkhorn_codes(cosines(), epsilon=1e-4, iterations=3)
        assert codes.isfinite().all()
        torch.testing.assert_close(codes.sum(dim=1), torch.ones(6))

    def test_a_queue_stands_for_more_images(self) -> None:
        mine, queue = cosines(6), cosines(9, seed=1)
        found = sinkhorn_codes(mine, epsilon=0.1, iterations=3, queue_scores=queue)
        together = sinkhorn_codes(torch.cat([mine, queue]), epsilon=0.1, iterations=3)
        torch.testing.assert_close(found, together[:6])

    def test_is_float32_without_gradient_also_under_autocast(self) -> None:
        scores = cosines().requires_grad_()
        codes = sinkhorn_codes(scores, epsilon=0.05, iterations=3)
        assert codes.dtype == torch.float32
        assert not codes.requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sinkhorn_codes(scores, epsilon=0.05, iterations=3), codes)


class TestSwAV:
    def test_small_views_predict_the_codes_of_the_two_large_ones(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
    ) -> None:
        method = SwAV(SMALL, tiny_backbone(batch_norm=False), training_set)
        large, small = make_views(size=8), make_views(num_views=3, size=4, seed=1)
        output = method(batch_of([*large, *small]), at(3))
        features = [method.backbone(view) for view in (*large, *small)]
        z = F.normalize(method.projector(torch.cat(features)), dim=1)
        scores = [s.detach() for s in (z @ method.prototypes.weight.T).split(8)]
        codes = [codes_by_hand(score, 0.05, 3) for score in scores[:2]]
        assert output.loss.item() == pytest.approx(swav_by_hand(scores, codes, 0.1).item(), 1e-4)
        torch.testing.assert_close(output.features, features[0].detach())

    def test_views_of_one_size_pass_the_backbone_together(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
    ) -> None:
        method = SwAV(SMALL, tiny_backbone(), training_set)
        seen: list[tuple[int, ...]] = []
        method.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
        views = [*make_views(size=8), *make_views(num_views=3, size=4)]
        method(batch_of(views), at(3))
        assert seen == [(16, 3, 8, 8), (24, 3, 4, 4)]

    def test_metrics_say_how_hard_the_codes_are_and_how_many_prototypes_are_near(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
    ) -> None:
        method = SwAV(SMALL, tiny_backbone(), training_set)
        views = make_views()
        z = F.normalize(method.projector(method.backbone(torch.cat(views))), dim=1)
        scores = method.prototypes(z).detach().split(8)
        codes = torch.cat([codes_by_hand(score, 0.05, 3) for score in scores])
        share = scores[0].argmax(dim=1).bincount(minlength=5) / 8
        metrics = method(batch_of(views), at(3)).metrics
        entropy = -(codes * codes.log()).sum(dim=1).mean().item()
        use = -sum(float(p) * math.log(p) for p in share if p > 0)
        agree = (codes[:8].argmax(dim=1) == codes[8:].argmax(dim=1)).float().mean().item()
        assert metrics["swav/code_entropy"].item() == pytest.approx(entropy, rel=1e-3)
        assert metrics["swav/prototype_entropy"].item() == pytest.approx(use, rel=1e-4)
        assert metrics["swav/code_agreement"].item() == pytest.approx(agree)

    def test_prototypes_have_length_1_from_the_start_and_after_every_step(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
    ) -> None:
        method = SwAV(SMALL, tiny_backbone(), training_set)
        weight = method.prototypes.weight
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(5))
        method(batch_of(make_views()), at(0))
        with torch.no_grad():
            weight.mul_(3)
        method.after_optimizer_step(at(0))
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(5))

    def test_prototypes_do_not_move_while_they_are_frozen(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
    ) -> None:
        config = SwAVConfig(hidden_dim=8, projection_dim=4, num_prototypes=5)  # one epoch
        method = SwAV(config, tiny_backbone(), training_set)
        optimizer = torch.optim.AdamW(method.parameters(), lr=0.1)
        moved = []
        for step in (0, 4, 5):
            optimizer.zero_grad()
            before = method.prototypes.weight.detach().clone()
            method(batch_of(make_views()), at(step)).loss.backward()
            method.before_optimizer_step(at(step))
            optimizer.step()
            method.after_optimizer_step(at(step))
            moved.append((method.prototypes.weight.detach() - before).abs().max().item() > 0.01)
        assert moved == [False, False, True]


class TestQueue:
    config = SMALL.model_copy(update={"queue_length": 20, "queue_start": Duration(steps=2)})

    def test_holds_the_newest_features_of_both_large_views_in_turn(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
    ) -> None:
        method = SwAV(self.config, tiny_backbone(), training_set)
        expected = torch.zeros(20, 2, 4)
        for step in range(6):
            views = [*make_views(seed=step), *make_views(num_views=1, size=4)]
            z = F.normalize(
                method.projector(
                    torch.cat([method.backbone(torch.cat(views[:2])), method.backbone(views[2])])
                ),
                dim=1,
            ).detach()
            method(batch_of(views), at(step))
            method.after_optimizer_step(at(step))
            for i in range(8 if step >= 2 else 0):
                place = ((step - 2) * 8 + i) % 20
                expected[place] = torch.stack([z[i], z[8 + i]])
        torch.testing.assert_close(method.queue, expected)

    def test_helps_with_the_codes_once_it_is_full(
        self,
        tiny_backbone: Callable[..., Backbone],
        make_views: Callable[..., list[Tensor]],
        training_set: TrainingSet,
    ) -> None:
        with_queue = SwAV(self.config, tiny_backbone(), training_set).eval()
        without = SwAV(SMALL, tiny_backbone(), training_set).eval()
        without.load_state_dict({k: v for k, v in with_queue.state_dict().items() if k != "queue"})
        generator = torch.Generator().manual_seed(0)
        with_queue.queue.copy_(F.normalize(torch.randn(20, 2, 4, generator=generator), dim=2))
        batch = batch_of(make_views())
        equal = [
            torch.equal(with_queue(batch, at(step)).loss, without(batch, at(step)).loss)
            for step in (0, 2, 3, 4, 5, 6)
        ]
        assert equal == [True, True, True, True, False, False]  # 3 steps x 8 images fill 20

    def test_is_no_longer_than_the_data_set_and_no_shorter_than_the_batch(
        self, tiny_backbone: Callable[..., Backbone], training_set: TrainingSet
    ) -> None:
        longer = SMALL.model_copy(update={"queue_length": 65})
        with pytest.raises(ConfigError, match=r"queue_length=65 is longer .* 64 images"):
            SwAV(longer, tiny_backbone(), training_set)
        with pytest.raises(ConfigError, match=r"queue_length=20 is shorter than the 24 images"):
            self.config.check_shape(RunShape(24, 1, (32, 32), BackboneConfig()))
        self.config.check_shape(RunShape(20, 1, (32, 32), BackboneConfig()))


class TestCheck:
    def test_takes_small_views_after_the_two_large_ones_only(self) -> None:
        SMALL.check_shape(RunShape(8, 1, (32, 32, 16, 16), BackboneConfig()))
        with pytest.raises(ConfigError, match=r"no other may be larger; .* \[32, 16, 32\] px"):
            SMALL.check_shape(RunShape(8, 1, (32, 16, 32), BackboneConfig()))
        with pytest.raises(ConfigError, match="takes 2 or more views"):
            SMALL.check_shape(RunShape(8, 1, (32,), BackboneConfig()))
