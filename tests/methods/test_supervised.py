import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from raysl.errors import ConfigError, DataError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.supervised import Supervised, SupervisedConfig, supervised_loss
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.classifier import save_head
from raysl.nn.heads import projection_mlp
from raysl.nn.mixing import mix_batch

DATA = TrainingSet(64, 8, (8,), class_counts=(3, 3, 2), class_names=("ant", "bee", "cat"))
CLASSES = 3
LABELS = torch.arange(8) % CLASSES


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_is_the_equation_in_loops(self, smoothing: float) -> None:
        logits, targets = double(5, 4), [0, 3, 1, 1, 2]
        total = 0.0
        for row, right in zip(logits.tolist(), targets, strict=True):
            norm = math.log(sum(math.exp(value) for value in row))
            for y, value in enumerate(row):
                q = (1 - smoothing) * (y == right) + smoothing / len(row)
                total -= q * (value - norm)
        found = supervised_loss(logits, torch.tensor(targets), label_smoothing=smoothing)
        assert float(found) == pytest.approx(total / 5, rel=1e-12)

    def test_equal_logits_give_log_c(self) -> None:
        found = supervised_loss(torch.zeros(3, 7), torch.tensor([0, 1, 2]))
        assert float(found) == pytest.approx(math.log(7))

    def test_probabilities_that_are_certain_are_labels(self) -> None:
        logits, labels = double(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
        certain = torch.nn.functional.one_hot(labels, 3).double()
        found = supervised_loss(logits, certain, label_smoothing=0.1)
        torch.testing.assert_close(found, supervised_loss(logits, labels, label_smoothing=0.1))

    def test_gradient_is_right(self) -> None:
        logits = double(4, 3).requires_grad_()
        labels = torch.tensor([0, 2, 1, 1])
        assert torch.autograd.gradcheck(lambda z: supervised_loss(z, labels), logits)

    @pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 2)])
    def test_other_shapes_are_an_error(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match=r"logits must be \(N, C\)"):
            supervised_loss(torch.zeros(4, 3), torch.zeros(shape, dtype=torch.int64))


class TestMixing:
    IMAGES = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 6, 6)
    TARGETS = torch.eye(4)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("kind", ["mixup", "cutmix"])
    def test_targets_are_the_shares_of_the_pixels(self, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        alphas = {"mixup": 0.0, "cutmix": 0.0} | {kind: 1.0}
        images, targets = mix_batch(self.IMAGES, self.TARGETS, **alphas)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        expected = targets @ torch.arange(4.0)  # image i is all i
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), expected, atol=1e-5, rtol=0)
        for row in range(4):
            assert set(targets[row].nonzero().flatten().tolist()) <= {row, 3 - row}
        if kind == "cutmix":  # each pixel is of one image or the other
            assert set(images.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}

    def test_leaves_the_batch_that_it_was_given(self) -> None:
        images = self.IMAGES.clone()
        mix_batch(images, self.TARGETS, mixup=1.0, cutmix=1.0)
        assert torch.equal(images, self.IMAGES)


class Made:
    """Builds methods on the tiny backbone."""

    def __init__(
        self, backbone: Callable[..., Backbone], views: Callable[..., list[Tensor]]
    ) -> None:
        self._backbone = backbone
        self.views = views(num_views=1)

    def method(self, **settings: Any) -> Supervised:
        backbone = self._backbone()
        torch.manual_seed(3)
        return Supervised(SupervisedConfig(**settings), backbone, DATA)

    def batch(self) -> Batch:
        return Batch(self.views, torch.arange(8), LABELS)


@pytest.fixture
def made(tiny_backbone: Callable[..., Backbone], make_views: Callable[..., list[Tensor]]) -> Made:
    return Made(tiny_backbone, make_views)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    mlp = projection_mlp(6, 5, 4, num_layers=3)
    save_head(tmp_path / "projection_head.safetensors", mlp, description={})
    return tmp_path


class TestSupervised:
    def test_its_loss_is_that_of_its_logits(self, made: Made, progress: Progress) -> None:
        method = made.method(label_smoothing=0.1)
        output = method(made.batch(), progress)
        again = method.label_classifier(made.views[0])
        expected = supervised_loss(again, LABELS, label_smoothing=0.1)
        torch.testing.assert_close(output.loss, expected)

    def test_the_classifier_begins_small_and_knows_the_names(self, made: Made) -> None:
        linear = made.method().network.linear
        assert 0.002 < float(linear.weight.detach().std()) < 0.03
        assert not linear.bias.any()
        assert made.method().network.class_names == ["ant", "bee", "cat"]

    @pytest.mark.parametrize(("layers", "inputs"), [(0, 6), (1, 5), (2, 5), (3, 4)])
    def test_keeps_the_first_layers_of_the_head(
        self, made: Made, head: Path, layers: int, inputs: int
    ) -> None:
        method = made.method(head=str(head), head_layers=layers)
        assert method.network.linear.in_features == inputs
        torch.manual_seed(5)
        mlp = projection_mlp(6, 5, 4, num_layers=3)
        for name, value in method.network.head.state_dict().items():
            assert torch.equal(value, mlp.state_dict()[name]), name
        assert all(parameter.requires_grad for parameter in method.parameters())

    def test_a_frozen_encoder_stays_as_it_is(self, made: Made, progress: Progress) -> None:
        method = made.method(freeze_encoder=True).train()
        before = {k: v.clone() for k, v in method.encoder.state_dict().items()}
        method(made.batch(), progress).loss.backward()
        assert all(p.grad is None for p in method.encoder.parameters())
        assert method.network.linear.weight.grad is not None
        for name, value in method.encoder.state_dict().items():
            assert torch.equal(value, before[name]), name  # batch norm too

    def test_mixing_is_for_training_alone(self, made: Made, progress: Progress) -> None:
        def loss(*, training: bool, **settings: Any) -> float:
            method = made.method(**settings).train(training)
            torch.nn.init.normal_(method.network.linear.weight, std=2.0)
            method.encoder.eval()  # so that batch norm makes no difference
            return float(method(made.batch(), progress).loss.detach())

        plain = loss(training=True)
        mixed = {"mixup": 1.0, "cutmix": 1.0}
        assert loss(training=False, **mixed) == plain
        assert loss(training=True, **mixed) != pytest.approx(plain, rel=1e-2)

    def test_no_labels_are_an_error(self, tiny_backbone: Callable[..., Backbone]) -> None:
        with pytest.raises(ConfigError, match="method supervised needs labels"):
            Supervised(SupervisedConfig(), tiny_backbone(), DATA._replace(class_counts=None))

    def test_a_head_that_is_too_short_is_an_error(self, made: Made, head: Path) -> None:
        with pytest.raises(ConfigError, match=r"head_layers: .*4 layers of a head that has 3"):
            made.method(head=str(head), head_layers=4)

    def test_a_head_of_another_encoder_is_an_error(self, made: Made, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        save_head(path, projection_mlp(9, 5, 4), description={})
        with pytest.raises(ConfigError, match="takes 9 features, the backbone gives 6"):
            made.method(head=str(path), head_layers=1)

    def test_a_head_that_is_not_there_is_an_error(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such file; it should be the projection head"):
            made.method(head=str(tmp_path), head_layers=1)


class TestConfig:
    def test_layers_need_a_head(self) -> None:
        with pytest.raises(ValidationError, match="head_layers=1 needs a projection head"):
            SupervisedConfig(head_layers=1)

    def test_random_features_are_not_frozen(self) -> None:
        shape = RunShape(8, 1, (32,), BackboneConfig(name="resnet18"))
        with pytest.raises(ConfigError, match=r"random features; set backbone\.weights"):
            SupervisedConfig(freeze_encoder=True).check_shape(shape)

    def test_one_view_is_enough_and_two_are_too_many(self) -> None:
        backbone = BackboneConfig(name="resnet18")
        SupervisedConfig().check_shape(RunShape(8, 1, (32,), backbone))
        with pytest.raises(ConfigError, match=r"takes 1 views of an image; data\.views makes 2"):
            SupervisedConfig().check_shape(RunShape(8, 1, (32, 32), backbone))
