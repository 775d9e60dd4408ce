import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.errors import ConfigError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.moco import MoCo, MoCoConfig, info_nce_loss
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.optim.build import OptimConfig, build_optimizer

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]

TRAINING_SET = TrainingSet(num_images=64, global_batch_size=8, view_sizes_px=(8, 8))


def as_batch(views: list[Tensor]) -> Batch:
    return Batch(views, torch.arange(len(views[0])))


def moco(backbone: Backbone, **settings: Any) -> MoCo:
    settings = {"queue_length": 16, "projection_dim": 4, "ema_momentum": 0.9} | settings
    torch.manual_seed(5)
    return MoCo(MoCoConfig(**settings), backbone, TRAINING_SET)


def at(step: int, seed: int = 7) -> Progress:
    return Progress(step=step, total_steps=20, steps_per_epoch=5, seed=seed)


def train_step(method: MoCo, views: list[Tensor], progress: Progress) -> None:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
    method(as_batch(views), progress).loss.backward()
    optimizer.step()
    method.after_optimizer_step(progress)


def keys_of(method: MoCo, view: Tensor) -> Tensor:
    """What the key encoder makes of a view, without leaving a trace in its statistics."""
    with torch.no_grad():
        return F.normalize(copy.deepcopy(method.key_encoder)(view), dim=1)


class TestLoss:
    def test_is_info_nce_of_queries_from_view_0_against_keys_from_view_1_and_the_queue(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone(), shuffle_batch_norm=False, temperature=0.3)
        train_step(method, make_views(seed=1), at(0))  # the two encoders are no longer equal
        views = make_views()
        query, key = method.query_encoder(views[0]), keys_of(method, views[1])
        expected = info_nce_loss(query, key, method.queue.keys, temperature=0.3)
        assert method(as_batch(views), at(1)).loss.item() == pytest.approx(
            expected.item(), rel=1e-6
        )

    def test_symmetric_is_the_mean_of_both_directions(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone(), shuffle_batch_norm=False, symmetric=True)
        views = make_views()
        one_way = [
            info_nce_loss(
                method.query_encoder(a), keys_of(method, b), method.queue.keys, temperature=0.2
            ).item()
            for a, b in (views, views[::-1])
        ]
        output = method(as_batch(views), at(0))
        assert abs(one_way[0] - one_way[1]) > 1e-4
        assert output.loss.item() == pytest.approx(sum(one_way) / 2, rel=1e-6)

    def test_mean_of_both_directions_trains_as_their_sum_at_half_the_rate_and_twice_the_decay(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        """Hence the settings of configs/moco_v2_resnet18_cifar10.yaml for the symmetric loss."""
        trained = []
        for factor, lr, decay in ((1, 0.12, 2.5e-4), (2, 0.06, 5e-4)):  # ours; the notebook's sum
            method = moco(tiny_backbone(), symmetric=True)
            optim = OptimConfig(
                base_lr=lr, lr_scaling="none", weight_decay=decay, decay_bias_and_norm=True
            )
            optimizer = build_optimizer(method.parameters(), optim)
            for step in range(3):
                optimizer.zero_grad()
                (factor * method(as_batch(make_views(seed=step)), at(step)).loss).backward()
                optimizer.step()
                method.after_optimizer_step(at(step))
            trained.append(method.state_dict())
        for name, value in trained[0].items():
            torch.testing.assert_close(value, trained[1][name])

    def test_partner_top1_is_one_if_every_query_equals_its_key(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone(), shuffle_batch_norm=False)
        view = make_views()[0]
        found = method(as_batch([view, view]), at(0)).metrics["moco/partner_top1"]
        assert found.item() == 1.0

    @pytest.mark.parametrize(("head", "layers"), [("linear", 1), ("mlp", 2)])
    def test_head_has_no_batch_norm_in_either_version(
        self, tiny_backbone: Backbones, head: str, layers: int
    ) -> None:
        kinds = [type(m).__name__ for m in moco(tiny_backbone(), head=head).query_encoder[1]]
        assert kinds == ["Linear", "ReLU", "Linear"][: 2 * layers - 1]

    def test_features_are_those_of_the_query_encoders_backbone(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        backbone = tiny_backbone(batch_norm=False)
        method = moco(backbone)
        views = make_views()
        assert method.encoder is backbone
        torch.testing.assert_close(
            method(as_batch(views), at(0)).features, backbone(views[0]).detach()
        )


class TestQueue:
    def test_is_a_ring_whose_length_need_not_be_a_multiple_of_the_batch(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone(), queue_length=11, shuffle_batch_norm=False)
        ring = list(method.queue.keys.clone())
        place = 0
        for step in range(5):  # 5 * 4 = 20 keys: it wraps within a batch
            views = make_views(4, seed=step)
            for key in keys_of(method, views[1]):
                ring[place % 11] = key
                place += 1
            train_step(method, views, at(step))
            torch.testing.assert_close(method.queue.keys, torch.stack(ring))
            assert int(method.queue.place) == place % 11

    def test_new_keys_are_not_negatives_of_their_own_step(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone())
        before = method.queue.keys.clone()
        method(as_batch(make_views()), at(0)).loss.backward()
        assert torch.equal(method.queue.keys, before)

    def test_symmetric_puts_the_keys_of_both_views_in(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone(), symmetric=True, shuffle_batch_norm=False)
        views = make_views(4)
        expected = torch.cat([keys_of(method, views[1]), keys_of(method, views[0])])
        train_step(method, views, at(0))
        torch.testing.assert_close(method.queue.keys[:8], expected)
        assert int(method.queue.place) == 8

    def test_starts_with_random_directions_and_stays_on_the_sphere(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone())
        torch.testing.assert_close(method.queue.keys.norm(dim=1), torch.ones(16))
        train_step(method, make_views(), at(0))
        torch.testing.assert_close(method.queue.keys.norm(dim=1), torch.ones(16))

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_shorter_than_the_keys_of_a_step_is_refused(self, symmetric: bool) -> None:
        keys = 128 if symmetric else 64
        config = MoCoConfig(queue_length=keys, symmetric=symmetric)
        config.check(RunShape(64, 2, (8, 8), BackboneConfig()))
        with pytest.raises(ConfigError) as caught:
            config.check(RunShape(65, 1, (8, 8), BackboneConfig()))
        assert f"method.queue_length={keys} is shorter than the {keys // 64 * 65} keys" in str(
            caught.value
        )

    def test_is_as_long_as_the_papers_or_the_data_set_by_default(
        self, tiny_backbone: Backbones
    ) -> None:
        assert len(moco(tiny_backbone(), queue_length=None).queue.keys) == 64
        config = MoCoConfig()
        assert config.size_defaults(TRAINING_SET) == {
            "queue_length": (64, "min(65,536, 64 images) = 64")
        }
        many = TRAINING_SET._replace(num_images=100_000)
        assert config.size_defaults(many)["queue_length"].value == 65_536
        assert MoCoConfig(queue_length=9).size_defaults(many) == {}

    def test_longer_than_the_data_set_is_refused(self, tiny_backbone: Backbones) -> None:
        moco(tiny_backbone(), queue_length=64)
        with pytest.raises(ConfigError, match=r"queue_length=65 is more than the 64 training imag"):
            moco(tiny_backbone(), queue_length=65)

    def test_age_is_that_of_its_oldest_key(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone(), queue_length=20)
        ages = []
        for step in range(5):  # 8 keys a step: it is full after 3, and its oldest is then 3 old
            metrics = method(as_batch(make_views(seed=step)), at(step)).metrics
            ages.append(metrics["moco/queue_age_steps"].item())
            method.after_optimizer_step(at(step))
        assert ages == [0, 1, 2, 3, 3]


class TestKeyEncoder:
    def test_follows_eq_2_after_each_step(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone(), ema_momentum=0.99)
        for step in range(3):
            before = [p.double() for p in method.key_encoder.parameters()]
            train_step(method, make_views(seed=step), at(step))
            for now, old, query in zip(
                method.key_encoder.parameters(),
                before,
                method.query_encoder.parameters(),
                strict=True,
            ):
                expected = 0.99 * old + 0.01 * query.detach().double()
                torch.testing.assert_close(now.double(), expected, rtol=1e-6, atol=1e-7)

    def test_starts_equal_and_gets_no_gradient(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone())
        assert all(
            map(torch.equal, method.key_encoder.parameters(), method.query_encoder.parameters())
        )
        method(as_batch(make_views()), at(0)).loss.backward()
        assert all(p.grad is None for p in method.key_encoder.parameters())
        assert all(not p.requires_grad for p in method.key_encoder.parameters())
        assert all(p.grad is not None for p in method.query_encoder.parameters())


class TestShuffle:
    def keys(self, method: MoCo, views: list[Tensor], progress: Progress) -> Tensor:
        n = len(views[1])
        method(as_batch(views), progress)
        method.after_optimizer_step(progress)
        return method.queue.keys[:n].clone()

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_is_undone(self, tiny_backbone: Backbones, make_views: Views, symmetric: bool) -> None:
        """Without batch norm a key depends on its own image alone, so the order must not show."""
        results = []
        for shuffle in (True, False):
            method = moco(
                tiny_backbone(batch_norm=False), shuffle_batch_norm=shuffle, symmetric=symmetric
            )
            loss = method(as_batch(make_views()), at(2)).loss.item()
            method.after_optimizer_step(at(2))
            results.append((loss, method.queue.keys))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
        torch.testing.assert_close(results[0][1], results[1][1])

    def test_changes_who_shares_batch_norm_statistics_over_splits(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        found = {}
        for scope in ("worker", "split"):
            for shuffle in (True, False):
                method = moco(tiny_backbone(), shuffle_batch_norm=shuffle)
                set_batch_norm_scope(method, scope, num_splits=4)  # type: ignore[arg-type]
                found[scope, shuffle] = self.keys(method, make_views(), at(0))
        # Over the whole batch the order does not matter; over splits the neighbours are others.
        torch.testing.assert_close(found["worker", True], found["worker", False])
        assert not torch.allclose(found["split", True], found["split", False], atol=1e-2)

    def test_is_a_function_of_seed_and_step_alone(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        def shuffled(progress: Progress) -> Tensor:
            method = moco(tiny_backbone())
            set_batch_norm_scope(method, "split", num_splits=4)
            torch.seed()  # the global generator is elsewhere each time
            return self.keys(method, make_views(), progress)

        first = shuffled(at(3))
        assert torch.equal(first, shuffled(at(3)))
        assert not torch.equal(first, shuffled(at(4)))
        assert not torch.equal(first, shuffled(at(3, seed=8)))

    def test_takes_nothing_from_the_global_generator(
        self, tiny_backbone: Backbones, make_views: Views
    ) -> None:
        method = moco(tiny_backbone())
        views = make_views()
        before = torch.get_rng_state()
        method(as_batch(views), at(0))
        assert torch.equal(torch.get_rng_state(), before)
