"""A batch in parts: cached for losses that compare images, accumulated for means over images."""

from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import ConfigError
from raysl.methods.base import (
    Batch,
    EmbeddingMethod,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.train.gradient import backward, can_split

PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5, seed=0)
DATA = TrainingSet(num_images=12, global_batch_size=12, view_sizes_px=(4, 4))
NUM_IMAGES = 12


class AnyConfig(MethodConfig):
    name: Literal["any"] = "any"


class Contrastive(EmbeddingMethod):
    """Compares every image with every other, by a learnable temperature, after dropout."""

    Config = AnyConfig

    def __init__(self, config: AnyConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.backbone = backbone
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.sizes: list[int] = []

    @property
    def encoder(self) -> Backbone:
        return self.backbone

    def embeddings(self, batch: Batch, progress: Progress) -> tuple[Tensor, ...]:
        self.sizes.append(len(batch.index))
        z0, z1 = (self.backbone(view) for view in batch.views)
        return z0.detach(), z0, z1

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        features, z0, z1 = embeddings
        logits = self.scale * nn.functional.normalize(z0) @ nn.functional.normalize(z1).T
        assert batch.labels is not None
        loss = nn.functional.cross_entropy(logits, torch.arange(len(z0)))
        return LossOutput(loss, features, {"any/labels": batch.labels.float().mean()})


class Mean(Method):
    """A loss that is a mean over images, and an adversary's of its own."""

    Config = AnyConfig
    loss_is_mean_over_images = True

    def __init__(self, config: AnyConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.backbone = backbone
        self.critic = nn.Linear(5, 1)

    @property
    def encoder(self) -> Backbone:
        return self.backbone

    @property
    def adversary(self) -> nn.Module:
        return self.critic

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        z = self.backbone(batch.views[0])
        theirs = self.critic(z.detach()).square().mean()
        size = z.detach().abs().mean()
        return LossOutput((z - 1).square().mean(), z.detach(), {"any/size": size}, theirs)


class Neither(Mean):
    loss_is_mean_over_images = False


def build(kind: type[Method], *, dropout: float = 0.0, norm: bool = False) -> Method:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(48, 16)]
    if norm:
        layers.append(nn.BatchNorm1d(16))
    layers += [nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 5)]
    method = kind(AnyConfig(), Backbone(nn.Sequential(*layers), embed_dim=5), DATA)
    return method.double()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = [
        torch.randn(NUM_IMAGES, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    ]
    return Batch(views, torch.arange(NUM_IMAGES), torch.arange(NUM_IMAGES) % 4)


def gradients_of(method: Method, size: int | None) -> tuple[LossOutput, dict[str, Tensor]]:
    method.zero_grad()
    output = backward(
        method, batch(), PROGRESS, model=method, autocast=nullcontext, micro_batch_size=size
    )
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return output, found


@pytest.mark.parametrize("kind", [Contrastive, Mean])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 12, 100])
def test_in_parts_of_any_size_loss_metrics_and_gradients_are_those_of_the_whole(
    kind: type[Method], size: int
) -> None:
    whole, expected = gradients_of(build(kind), None)
    parts, found = gradients_of(build(kind), size)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.metrics, whole.metrics)
    torch.testing.assert_close(parts.features, whole.features)
    assert expected.keys() == found.keys()
    assert "scale" in found or "critic.weight" in found
    torch.testing.assert_close(found, expected)


def test_no_forward_pass_is_larger_than_a_part() -> None:
    method = build(Contrastive)
    gradients_of(method, 5)
    assert isinstance(method, Contrastive)
    assert method.sizes == [5, 5, 2, 5, 5, 2]  # each part twice


def test_dropout_drops_the_same_units_in_both_passes() -> None:
    """In one part the cached gradient is then the plain one of the same random numbers."""
    found = []
    for seed, size in ((3, None), (3, NUM_IMAGES), (4, NUM_IMAGES)):
        method = build(Contrastive, dropout=0.5)
        torch.manual_seed(seed)
        found.append(gradients_of(method, size)[1])
    torch.testing.assert_close(found[1], found[0])
    name = "backbone.net.1.weight"
    assert not torch.allclose(found[2][name], found[0][name])


def test_running_statistics_move_once_a_part() -> None:
    """With batch norm the parts are what ``batch_norm: split`` makes of the whole."""
    method = build(Contrastive, norm=True)
    gradients_of(method, 4)
    norm = next(m for m in method.modules() if isinstance(m, nn.BatchNorm1d))
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 2 * 3  # two views of three parts
    assert norm.track_running_stats


def test_the_random_numbers_after_a_step_do_not_repeat_those_of_its_parts() -> None:
    method = build(Contrastive, dropout=0.5)
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    gradients_of(method, 4)
    assert torch.rand(1) != before


@pytest.mark.parametrize(("kind", "can"), [(Contrastive, True), (Mean, True), (Neither, False)])
def test_says_which_methods_can_be_cut(kind: type[Method], can: bool) -> None:
    assert can_split(kind) == can
    if not can:
        with pytest.raises(ConfigError, match="the loss of Neither can neither be cached nor"):
            gradients_of(build(kind), 4)
