import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from raysl.errors import ConfigError, DataError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.supervised import Supervised, SupervisedConfig, supervised_loss
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.classifier import load_head, save_head
from raysl.nn.heads import projection_mlp
from raysl.nn.mixing import mix_batch
from raysl.optim.build import OptimConfig, Special, param_groups
from raysl.train.loop import _seed_step

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]

CLASSES = ("cat", "dog", "cow")
DATA = TrainingSet(
    num_images=64,
    global_batch_size=8,
    view_sizes_px=(8,),
    class_counts=(22, 21, 21),
    class_names=CLASSES,
)


def cross_entropy_by_hand(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Image by image and class by class, in float64."""
    n, num_classes = logits.shape
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        row = logits[i].double()
        partition = sum(torch.exp(row[y]) for y in range(num_classes))
        for y in range(num_classes):
            own = float(targets[i] == y) if targets.ndim == 1 else float(targets[i, y])
            q = (1 - smoothing) * own + smoothing / num_classes
            total = total - q * torch.log(torch.exp(row[y]) / partition)
    return total / n


def made_up_logits(n: int = 5, num_classes: int = 4) -> Tensor:
    torch.manual_seed(0)
    return (3 * torch.randn(n, num_classes)).requires_grad_()


class TestSupervisedLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
    @pytest.mark.parametrize("kind", ["numbers", "probabilities"])
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, smoothing: float, kind: str
    ) -> None:
        logits = made_up_logits()
        targets = torch.tensor([3, 0, 1, 1, 2])
        if kind == "probabilities":
            targets = torch.randn(5, 4).softmax(dim=1)
        loss = supervised_loss(logits, targets, label_smoothing=smoothing)
        expected = cross_entropy_by_hand(logits, targets, smoothing)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, logits)
        (exact,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    def test_equal_logits_give_the_log_of_the_number_of_classes(self, smoothing: float) -> None:
        loss = supervised_loss(torch.ones(3, 7), torch.tensor([0, 6, 2]), label_smoothing=smoothing)
        assert loss.item() == pytest.approx(math.log(7))

    def test_smoothing_keeps_a_sure_answer_from_costing_nothing(self) -> None:
        logits, labels = 100 * torch.eye(4), torch.arange(4)
        assert supervised_loss(logits, labels).item() == 0.0
        smooth = supervised_loss(logits, labels, label_smoothing=0.1)
        assert smooth.item() == pytest.approx(100 * 0.1 * 3 / 4)

    def test_is_exact_under_autocast_and_keeps_float64(self) -> None:
        logits, labels = made_up_logits(), torch.tensor([3, 0, 1, 1, 2])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = supervised_loss(logits, labels)
        assert torch.equal(found, supervised_loss(logits, labels))
        assert supervised_loss(logits.bfloat16(), labels).dtype == torch.float32
        assert supervised_loss(logits.double(), labels).dtype == torch.float64

    @pytest.mark.parametrize(
        ("logits", "targets", "message"),
        [
            ((5, 4), (4,), r"got \(5, 4\), \(4,\)"),
            ((5, 4), (5, 3), r"got \(5, 4\), \(5, 3\)"),
            ((5,), (5,), r"logits must be \(N, C\)"),
        ],
    )
    def test_says_which_shapes_it_got(
        self, logits: tuple[int, ...], targets: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ShapeError, match=message):
            supervised_loss(torch.zeros(logits), torch.zeros(targets))


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """The file of a projection head of three layers whose batch norms have seen something."""
    torch.manual_seed(4)
    whole = projection_mlp(6, 5, 4, num_layers=3)
    whole(torch.randn(16, 6) + 1)
    save_head(tmp_path / "projection_head.safetensors", whole, description={})
    return tmp_path / "projection_head.safetensors"


def build(backbone: Backbone, **settings: Any) -> Supervised:
    torch.manual_seed(5)
    return Supervised(SupervisedConfig(**settings), backbone, DATA)


def batch_of(views: list[Tensor]) -> Batch:
    return Batch(views[:1], torch.arange(8), torch.arange(8) % 3)


class TestSupervised:
    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_loss_and_metrics_are_those_of_the_classifier_on_the_one_view(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, smoothing: float
    ) -> None:
        method = build(tiny_backbone(), label_smoothing=smoothing)
        nn.init.normal_(method.network.linear.weight)
        batch = batch_of(make_views())
        output = method(batch, progress)
        features = method.encoder(batch.views[0]).detach()
        logits = F.linear(features, method.network.linear.weight, method.network.linear.bias)
        assert batch.labels is not None
        expected = cross_entropy_by_hand(logits.detach(), batch.labels, smoothing)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(output.features, features)
        hits = [int(logits[i].argmax()) == i % 3 for i in range(8)]
        assert output.metrics["supervised/accuracy"].item() == pytest.approx(sum(hits) / 8)
        confidence = logits.softmax(dim=1).amax(dim=1).mean().item()
        assert output.metrics["supervised/confidence"].item() == pytest.approx(confidence)
        assert method(batch, progress._replace(is_logged=False)).metrics == {}

    @pytest.mark.parametrize("layers", [0, 1, 2, 3])
    def test_gradient_reaches_encoder_kept_layers_and_classifier(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        head: Path,
        layers: int,
    ) -> None:
        method = build(tiny_backbone(), head=str(head), head_layers=layers)
        method(batch_of(make_views()), progress).loss.backward()
        names = {name.split(".")[1] for name, _ in method.named_parameters()}
        assert names == {"encoder", "linear"} | ({"head"} if layers else set())
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_a_frozen_encoder_gets_no_gradient_and_keeps_its_statistics(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, head: Path
    ) -> None:
        method = build(tiny_backbone(), head=str(head), head_layers=1, freeze_encoder=True)
        before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
        statistics = method.network.head[1].running_mean.clone()
        method.train()  # as the loop does
        batch = batch_of(make_views())
        output = method(batch, progress)
        output.loss.backward()
        assert all(p.grad is None for p in method.encoder.parameters())
        assert all(torch.equal(v, before[name]) for name, v in method.encoder.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(output.features, method.encoder.eval()(batch.views[0]))
        learning = [
            p for part in (method.network.head, method.network.linear) for p in [*part.parameters()]
        ]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning)
        assert not torch.equal(method.network.head[1].running_mean, statistics)
        found = [
            p for group in param_groups(method.parameters(), OptimConfig()) for p in group["params"]
        ]
        assert {id(p) for p in found} == {id(p) for p in learning}

    @pytest.mark.parametrize(("layers", "modules"), [(0, 0), (1, 3), (2, 6), (3, 8)])
    def test_kept_layers_are_the_first_ones_of_the_pretrained_head(
        self, tiny_backbone: Backbones, head: Path, layers: int, modules: int
    ) -> None:
        method = build(tiny_backbone(), head=str(head.parent), head_layers=layers)
        kept, whole = method.network.head.state_dict(), load_head(head).state_dict()
        assert len(method.network.head) == modules
        assert {name.split(".")[0] for name in kept} <= {str(place) for place in range(modules)}
        assert all(torch.equal(value, whole[name]) for name, value in kept.items())
        assert all(name in kept for name in whole if int(name.split(".")[0]) < modules)
        assert method.network.linear.in_features == [6, 5, 5, 4][layers]

    def test_classifies_what_the_kept_layer_makes_of_the_features(
        self, tiny_backbone: Backbones, make_views: Views, head: Path
    ) -> None:
        method = build(tiny_backbone(), head=str(head), head_layers=1).eval()
        linear, norm = load_head(head)[:2]
        images = make_views()[0]
        with torch.no_grad():
            hidden = F.linear(method.encoder(images), linear.weight)
            hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            hidden = (hidden * norm.weight + norm.bias).clamp(min=0)
            last = method.network.linear
            expected = F.linear(hidden, last.weight, last.bias)
            torch.testing.assert_close(method.network(images), expected)

    def test_starts_from_the_encoder_it_was_given_and_a_classifier_that_knows_nothing(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        backbone = tiny_backbone()
        method = build(backbone)
        assert method.encoder is backbone
        for name, value in tiny_backbone().state_dict().items():
            assert torch.equal(value, backbone.state_dict()[name]), name
        assert len(method.network.head) == 0
        assert method.network.linear.bias.count_nonzero() == 0
        assert 0.003 < method.network.linear.weight.std() < 0.03
        assert method(batch_of(make_views()), progress).loss.item() == pytest.approx(
            math.log(3), abs=0.1
        )
        assert method.label_classifier is method.network
        assert method.network.class_names == list(CLASSES)

    def test_lars_leaves_the_classifier_unadapted(self, tiny_backbone: Backbones) -> None:
        method = build(tiny_backbone())
        plain = {p for module in method.unadapted_modules for p in module.parameters()}
        config = OptimConfig(name="lars", weight_decay=0.1)
        groups = param_groups(method.parameters(), config, special=Special(unadapted=plain))
        where = {id(p): group for group in groups for p in group["params"]}
        weight = where[id(method.network.linear.weight)]
        assert (weight["adapt"], weight["weight_decay"]) == (False, 0.0)
        assert where[id(next(method.encoder.parameters()))].get("adapt", True) is True

    def test_nameless_classes_are_named_by_their_numbers(self, tiny_backbone: Backbones) -> None:
        data = DATA._replace(class_names=())
        method = Supervised(SupervisedConfig(), tiny_backbone(), data)
        assert method.network.class_names == ["0", "1", "2"]


class TestMixing:
    @pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
    def test_loss_is_that_of_the_mixed_images_and_labels(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        mixup: float,
        cutmix: float,
    ) -> None:
        method = build(tiny_backbone(), mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
        nn.init.normal_(method.network.linear.weight)
        batch = batch_of(make_views())
        assert batch.labels is not None
        torch.manual_seed(11)
        loss = method(batch, progress).loss.item()
        torch.manual_seed(11)
        images, targets = mix_batch(
            batch.views[0], F.one_hot(batch.labels, 3).float(), mixup=mixup, cutmix=cutmix
        )
        logits = method.network(images).detach()
        expected = cross_entropy_by_hand(logits, targets, 0.1).item()
        assert loss == pytest.approx(expected, rel=1e-5)

    def test_is_a_function_of_seed_step_and_rank(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        method = build(tiny_backbone(), mixup=0.8, cutmix=1.0)
        nn.init.normal_(method.network.linear.weight)
        batch = batch_of(make_views())

        def loss(seed: int, step: int, rank: int) -> float:
            _seed_step(seed, step, rank)
            return method(batch, progress._replace(step=step, seed=seed)).loss.item()

        places = [(7, 3, 0), (7, 4, 0), (8, 3, 0), (7, 3, 1)]
        first = [loss(*place) for place in places]
        assert len(set(first)) == 4
        assert [loss(*place) for place in reversed(places)] == first[::-1]

    def test_is_for_training_alone(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress
    ) -> None:
        batch = batch_of(make_views())
        losses = [
            build(tiny_backbone(), mixup=mixup, cutmix=mixup).eval()(batch, progress).loss
            for mixup in (0.0, 1.0)
        ]
        assert torch.equal(*losses)


class TestErrors:
    def test_without_labels(self, tiny_backbone: Backbones) -> None:
        data = DATA._replace(class_counts=None, class_names=())
        with pytest.raises(ConfigError, match=r"method supervised needs labels; .* have none"):
            Supervised(SupervisedConfig(), tiny_backbone(), data)

    def test_more_layers_than_the_head_has(self, tiny_backbone: Backbones, head: Path) -> None:
        with pytest.raises(
            ConfigError, match=rf"^method\.head_layers: {head}: 4 layers of a head that has 3"
        ):
            build(tiny_backbone(), head=str(head), head_layers=4)

    def test_layers_of_no_head(self) -> None:
        with pytest.raises(ValidationError, match="head_layers=1 needs a projection head"):
            SupervisedConfig(head_layers=1)

    def test_the_head_of_another_encoder(self, tiny_backbone: Backbones, tmp_path: Path) -> None:
        path = tmp_path / "head.safetensors"
        save_head(path, projection_mlp(7, 5, 4), description={})
        with pytest.raises(ConfigError, match="takes 7 features, the backbone gives 6"):
            build(tiny_backbone(), head=str(path), head_layers=1)

    def test_a_head_that_is_not_there(self, tiny_backbone: Backbones, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"projection_head\.safetensors: no such file"):
            build(tiny_backbone(), head=str(tmp_path), head_layers=1)

    def test_a_head_that_begins_with_something_else(
        self, tiny_backbone: Backbones, tmp_path: Path
    ) -> None:
        path = tmp_path / "head.safetensors"
        save_head(path, nn.Sequential(nn.ReLU(), nn.Linear(6, 4)), description={})
        with pytest.raises(ConfigError, match=r"head\.safetensors: .*begins with a ReLU"):
            build(tiny_backbone(), head=str(path), head_layers=1)

    def test_a_random_encoder_that_is_to_stay_as_it_is(self) -> None:
        def check(weights: str | None, *, frozen: bool) -> None:
            shape = RunShape(8, 1, (8,), BackboneConfig(name="resnet18", weights=weights))
            SupervisedConfig(freeze_encoder=frozen).check_shape(shape)

        check("a/run", frozen=True)
        check(None, frozen=False)
        with pytest.raises(ConfigError, match=r"random features; set backbone.weights"):
            check(None, frozen=True)
