import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raysl.errors import ShapeError
from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.methods.rotation import Rotation, RotationConfig, rotation_loss
from raysl.nn.backbones import Backbone
from raysl.nn.rotations import rotate

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]


def batch_of(image: Tensor) -> Batch:
    return Batch([image], torch.arange(len(image)))


class TestRotationLoss:
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(self) -> None:
        torch.manual_seed(0)
        logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
        turns = torch.tensor([0, 3, 1, 2, 2, 0, 1])
        by_hand = torch.zeros((), dtype=torch.float64)
        for row, y in zip(logits, turns.tolist(), strict=True):
            probability = torch.exp(row[y]) / sum(torch.exp(v) for v in row)
            by_hand = by_hand - torch.log(probability) / len(turns)
        loss = rotation_loss(logits, turns)
        torch.testing.assert_close(loss, by_hand)
        torch.testing.assert_close(
            torch.autograd.grad(loss, logits), torch.autograd.grad(by_hand, logits)
        )
        assert torch.autograd.gradcheck(lambda x: rotation_loss(x, turns), logits)

    def test_knowing_nothing_costs_log_4(self) -> None:
        loss = rotation_loss(torch.ones(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]))
        assert loss.item() == pytest.approx(math.log(4))

    def test_is_float32_under_autocast(self) -> None:
        logits, turns = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = rotation_loss(logits.bfloat16(), turns)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, rotation_loss(logits.bfloat16().float(), turns))

    def test_says_which_shapes_it_got(self) -> None:
        with pytest.raises(ShapeError, match=r"got \(5, 3\), \(5,\)"):
            rotation_loss(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))


class TestRotation:
    def test_all_classifies_the_four_turns_of_every_image(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        method = Rotation(RotationConfig(), tiny_backbone(batch_norm=False), training_set)
        image = make_views(num_views=1)[0]
        output = method(batch_of(image), progress)
        losses = []
        for k in range(4):
            logits = method.classifier(method.backbone(torch.rot90(image, k, (2, 3))))
            losses.append(rotation_loss(logits, torch.full((8,), k)))
        torch.testing.assert_close(output.loss, torch.stack(losses).mean())
        torch.testing.assert_close(output.features, method.encoder(image).detach())

    def test_one_classifies_a_random_turn_of_each(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        config = RotationConfig(rotations="one")
        method = Rotation(config, tiny_backbone(batch_norm=False), training_set)
        image = make_views(num_views=1)[0]
        torch.manual_seed(5)
        output = method(batch_of(image), progress)
        torch.manual_seed(5)
        turns = torch.randint(4, (8,))
        assert len(turns.unique()) > 1
        features = method.backbone(rotate(image, turns))
        torch.testing.assert_close(output.loss, rotation_loss(method.classifier(features), turns))
        torch.testing.assert_close(output.features, features.detach())

    def test_accuracy_and_entropy_of_a_network_that_always_says_upright(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        method = Rotation(RotationConfig(), tiny_backbone(), training_set)
        torch.nn.init.zeros_(method.classifier.weight)
        method.classifier.bias.data = torch.tensor([50.0, 0, 0, 0])
        metrics = method(batch_of(make_views(num_views=1)[0]), progress).metrics
        assert metrics["rotation/accuracy"].item() == pytest.approx(0.25)
        assert metrics["rotation/entropy"].item() == pytest.approx(0.0, abs=1e-6)
        torch.nn.init.zeros_(method.classifier.bias)
        metrics = method(batch_of(make_views(num_views=1)[0]), progress).metrics
        assert metrics["rotation/entropy"].item() == pytest.approx(math.log(4))

    def test_learns_which_side_is_bright(
        self, tiny_backbone: Backbones, progress: Progress, training_set: TrainingSet
    ) -> None:
        method = Rotation(RotationConfig(), tiny_backbone(), training_set)
        images = torch.linspace(-1, 1, 8).view(1, 1, 8, 1).expand(8, 3, 8, 8)
        images = images + 0.1 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
        for _ in range(40):
            output = method(batch_of(images), progress)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        assert output.metrics["rotation/accuracy"] > 0.9

    def test_pictures_show_each_image_in_its_four_turns(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        training_set: TrainingSet,
    ) -> None:
        method = Rotation(RotationConfig(), tiny_backbone(), training_set).eval()
        image = make_views(3, num_views=1)[0]
        grid = method.pictures(batch_of(image), progress)["rotations"]
        assert grid.images.shape == (3, 4, 3, 8, 8)
        assert torch.equal(grid.images[:, 2], image.flip(2, 3))
        assert [title.split("\n")[0] for title in grid.columns] == [
            "0 deg",
            "90 deg",
            "180 deg",
            "270 deg",
        ]
