import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysl.errors import ConfigError, DataError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.distill import Distill, DistillConfig, distillation_loss, known_label_loss
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.classifier import load_classifier, save_classifier
from raysl.nn.network_file import write_network
from raysl.optim.build import OptimConfig, build_optimizer

Backbones = Callable[..., Backbone]
Views = Callable[..., list[Tensor]]

DATA = TrainingSet(num_images=64, global_batch_size=8, view_sizes_px=(32,))
TEMPERATURES = [0.5, 1.0, 4.0]


def log_probability(row: Tensor, y: int, temperature: float) -> Tensor:
    """The definition below Eq. (2), in float64."""
    terms = [torch.exp(value.double() / temperature) for value in row]
    return torch.log(terms[y] / torch.stack(terms).sum())


def distillation_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Eq. (2), image by image and class by class, over the number of images."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(student, teacher, strict=True):
        for y in range(len(ours)):
            weight = torch.exp(log_probability(theirs.detach(), y, temperature))
            total = total - weight * log_probability(ours, y, temperature)
    return total / len(student)


def labels_by_hand(logits: Tensor, labels: list[int]) -> Tensor:
    """The mean over the known labels, which are at least one."""
    losses = [-log_probability(logits[i], y, 1.0) for i, y in enumerate(labels) if y >= 0]
    return torch.stack(losses).mean()


def entropy_by_hand(logits: Tensor, temperature: float) -> float:
    return distillation_by_hand(logits, logits, temperature).item()


def pair(n: int = 5, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(n, num_classes), 2 * torch.randn(n, num_classes)
    return student.requires_grad_(), teacher.requires_grad_()


class TestDistillationLoss:
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_equals_the_equation_written_as_loops_in_value_and_gradient(
        self, temperature: float
    ) -> None:
        student, teacher = pair()
        loss = distillation_loss(student, teacher, temperature=temperature)
        expected = distillation_by_hand(student, teacher, temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, student)
        (exact,) = torch.autograd.grad(expected, student)
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_hard_targets_are_the_teachers_best_classes(self, temperature: float) -> None:
        student, teacher = pair()
        found = distillation_loss(student, teacher, temperature=temperature, hard=True)
        best = [row.index(max(row)) for row in teacher.tolist()]
        rows = [-log_probability(student[i], y, temperature) for i, y in enumerate(best)]
        assert found.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_is_at_least_the_teachers_entropy_which_only_a_copy_reaches(
        self, temperature: float
    ) -> None:
        student, teacher = pair()
        least = entropy_by_hand(teacher.detach(), temperature)
        assert distillation_loss(student, teacher, temperature=temperature).item() > least + 0.01
        copy = (teacher.detach() + 3).requires_grad_()  # logits are relative
        loss = distillation_loss(copy, teacher, temperature=temperature)
        assert loss.item() == pytest.approx(least, rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, copy)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-6)

    def test_a_low_temperature_makes_soft_targets_hard(self) -> None:
        student, teacher = pair()
        soft = distillation_loss(0.01 * student, 10 * teacher, temperature=0.01)
        hard = distillation_loss(0.01 * student, 10 * teacher, temperature=0.01, hard=True)
        assert soft.item() == pytest.approx(hard.item(), rel=1e-5)

    def test_a_teacher_that_knows_nothing_and_a_student_that_does_not_give_log_classes(
        self,
    ) -> None:
        loss = distillation_loss(torch.ones(3, 7), torch.zeros(3, 7), temperature=0.3)
        assert loss.item() == pytest.approx(math.log(7))

    @pytest.mark.parametrize("hard", [False, True])
    def test_no_gradient_goes_to_the_teacher(self, hard: bool) -> None:
        student, teacher = pair()
        distillation_loss(student, teacher, temperature=2.0, hard=hard).backward()
        assert teacher.grad is None
        assert student.grad is not None

    def test_is_exact_under_autocast_and_keeps_float64(self) -> None:
        student, teacher = pair()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = distillation_loss(student, teacher, temperature=0.5)
        assert torch.equal(found, distillation_loss(student, teacher, temperature=0.5))
        exact = distillation_loss(student.double(), teacher.double(), temperature=0.5)
        assert exact.dtype == torch.float64

    @pytest.mark.parametrize(
        ("student", "teacher"), [((5, 4), (5, 3)), ((5, 4), (4, 4)), ((4,), (4,))]
    )
    def test_says_which_shapes_it_got(
        self, student: tuple[int, ...], teacher: tuple[int, ...]
    ) -> None:
        with pytest.raises(ShapeError, match=r"must both be \(N, C\); got \("):
            distillation_loss(torch.zeros(student), torch.zeros(teacher), temperature=1.0)


class TestKnownLabelLoss:
    @pytest.mark.parametrize("labels", [[3, 0, 1, 1, 2], [-1, 0, -1, -1, 2], [-1, -1, -1, -1, 3]])
    def test_is_the_mean_over_the_labels_that_are_known(self, labels: list[int]) -> None:
        logits, _ = pair()
        loss = known_label_loss(logits, torch.tensor(labels))
        expected = labels_by_hand(logits, labels)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, logits)
        (exact,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)
        unknown = torch.tensor(labels) < 0
        assert gradient[unknown].count_nonzero() == 0

    def test_without_any_is_nothing_and_pulls_nowhere(self) -> None:
        logits, _ = pair()
        loss = known_label_loss(logits, torch.full((5,), -1))
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.count_nonzero() == 0


def build(backbone: Backbone, teacher: Path, **settings: Any) -> Distill:
    torch.manual_seed(5)
    method = Distill(DistillConfig(teacher=str(teacher), **settings), backbone, DATA)
    nn.init.normal_(method.network.linear.weight)
    return method


LABELS = [0, -1, 2, -1, -1, 1, 1, -1]


def batch_of(make_views: Views, *, labelled: bool = True) -> Batch:
    labels = torch.tensor(LABELS) if labelled else None
    return Batch(make_views(size=32)[:1], torch.arange(8), labels)


class TestDistill:
    @pytest.mark.parametrize("alpha", [1.0, 0.7, 0.0])
    @pytest.mark.parametrize("squared", [False, True])
    def test_loss_weighs_teacher_and_labels(
        self,
        tiny_backbone: Backbones,
        make_views: Views,
        progress: Progress,
        teacher: Path,
        alpha: float,
        squared: bool,
    ) -> None:
        settings = {"temperature": 2.0, "temperature_squared": squared}
        method = build(tiny_backbone(), teacher, distillation_weight=alpha, **settings)
        batch = batch_of(make_views)
        output = method(batch, progress)
        with torch.no_grad():
            ours = method.network(batch.views[0])
            theirs = load_classifier(teacher)(batch.views[0])
        imitation = distillation_by_hand(ours, theirs, 2.0).item()
        known = labels_by_hand(ours, LABELS).item()
        expected = (1 - alpha) * known + alpha * imitation * (4 if squared else 1)
        assert output.loss.item() == pytest.approx(expected, rel=1e-5)
        assert output.metrics["distill/loss"].item() == pytest.approx(imitation, rel=1e-5)
        assert ("distill/label_loss" in output.metrics) == (alpha < 1)
        if alpha < 1:
            assert output.metrics["distill/label_loss"].item() == pytest.approx(known, rel=1e-5)

    def test_metrics_are_counted_by_hand(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, teacher: Path
    ) -> None:
        method = build(tiny_backbone(), teacher, temperature=0.5)
        batch = batch_of(make_views)
        output = method(batch, progress)
        found = {name: value.item() for name, value in output.metrics.items()}
        with torch.no_grad():
            features = method.encoder(batch.views[0])
            ours, theirs = method.network(batch.views[0]), load_classifier(teacher)(batch.views[0])
        same = sum(int(ours[i].argmax()) == int(theirs[i].argmax()) for i in range(8))
        assert found["distill/agreement"] == pytest.approx(same / 8)
        sure = [max(float(p) for p in row.softmax(dim=0)) for row in theirs]
        assert found["distill/teacher_confidence"] == pytest.approx(sum(sure) / 8)
        assert found["distill/teacher_entropy"] == pytest.approx(
            entropy_by_hand(theirs, 0.5), rel=1e-4
        )
        assert found["distill/loss"] >= found["distill/teacher_entropy"]
        torch.testing.assert_close(output.features, features)
        assert method(batch, progress._replace(is_logged=False)).metrics == {}

    def test_hard_targets_are_a_setting(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, teacher: Path
    ) -> None:
        method = build(tiny_backbone(), teacher, targets="hard")
        batch = batch_of(make_views)
        loss = method(batch, progress).loss
        with torch.no_grad():
            best = load_classifier(teacher)(batch.views[0]).argmax(dim=1).tolist()
            expected = labels_by_hand(method.network(batch.views[0]), best)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_images_without_any_label_are_all_left_to_the_teacher(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, teacher: Path
    ) -> None:
        method = build(tiny_backbone(), teacher, distillation_weight=0.5)
        output = method(batch_of(make_views, labelled=False), progress)
        assert "distill/label_loss" not in output.metrics
        assert torch.equal(output.loss.detach(), output.metrics["distill/loss"])

    def test_asks_for_labels_only_if_they_count(self) -> None:
        assert DistillConfig(distillation_weight=0.9).uses_labels
        assert not DistillConfig().uses_labels
        assert not DistillConfig().needs_labels


class TestTeacher:
    def test_stays_as_it_is_while_the_student_learns(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, teacher: Path
    ) -> None:
        method = build(tiny_backbone(), teacher)
        before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
        student = {name: value.clone() for name, value in method.state_dict().items()}
        method.train()
        optimizer = build_optimizer(method.parameters(), OptimConfig(base_lr=0.5))
        method(batch_of(make_views), progress).loss.backward()
        optimizer.step()
        assert not any(module.training for module in method.teacher.modules())
        assert not any(p.requires_grad for p in method.teacher.parameters())
        assert all(p.grad is None for p in method.teacher.parameters())
        for name, value in method.teacher.state_dict().items():
            assert torch.equal(value, before[name]), name
        changed = [not torch.equal(v, student[name]) for name, v in method.state_dict().items()]
        assert all(changed)

    def test_is_no_part_of_the_module(self, tiny_backbone: Backbones, teacher: Path) -> None:
        method = build(tiny_backbone(), teacher)
        theirs = {id(p) for p in method.teacher.parameters()}
        assert not any(id(p) in theirs for p in method.parameters())
        assert not any(module is method.teacher for module in method.modules())
        ours = {f"network.{name}" for name in method.network.state_dict()}
        assert set(method.state_dict()) == ours
        optimizer = build_optimizer(method.parameters(), OptimConfig())
        found = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert found == {id(p) for p in method.network.parameters()}
        assert method.label_classifier is method.network
        assert method.encoder is method.network.encoder

    def test_goes_along_to_another_dtype(
        self, tiny_backbone: Backbones, make_views: Views, progress: Progress, teacher: Path
    ) -> None:
        method = build(tiny_backbone(), teacher).double()
        floating = [p for p in method.teacher.state_dict().values() if p.is_floating_point()]
        assert {p.dtype for p in floating} == {torch.float64}
        batch = Batch([make_views(size=32)[0].double()], torch.arange(8))
        assert method(batch, progress).loss.dtype == torch.float64

    def test_says_what_the_students_classes_are(
        self, tiny_backbone: Backbones, teacher: Path
    ) -> None:
        method = build(tiny_backbone(), teacher)
        assert method.network.class_names == method.teacher.class_names == ["0", "1", "2"]
        assert method.network.linear.out_features == 3


class TestErrors:
    def build(self, backbone: Backbone, teacher: Path, **known: Any) -> None:
        Distill(DistillConfig(teacher=str(teacher)), backbone, DATA._replace(**known))

    def test_no_teacher(self, tiny_backbone: Backbones) -> None:
        shape = RunShape(8, 1, (32,), BackboneConfig(name="resnet18"))
        with pytest.raises(ConfigError, match=r"^method\.teacher: missing; give the folder"):
            DistillConfig().check_shape(shape)
        with pytest.raises(ConfigError, match=r"^method\.teacher: missing; give the folder"):
            Distill(DistillConfig(), tiny_backbone(), DATA)

    @pytest.mark.parametrize("names", [("0", "1"), ("0", "1", "2", "3"), ("0", "2", "1")])
    def test_a_teacher_of_other_classes(
        self, tiny_backbone: Backbones, teacher: Path, names: tuple[str, ...]
    ) -> None:
        known = {"class_names": names, "class_counts": (8,) * len(names)}
        with pytest.raises(ConfigError, match=r"knows the classes 0, 1, 2, the training images ha"):
            self.build(tiny_backbone(), teacher, **known)

    def test_more_classes_without_names_than_the_teacher_knows(
        self, tiny_backbone: Backbones, teacher: Path
    ) -> None:
        self.build(tiny_backbone(), teacher, class_counts=(8, 8, 8))
        with pytest.raises(ConfigError, match=r"knows 3 classes, the training images have 4"):
            self.build(tiny_backbone(), teacher, class_counts=(8, 8, 8, 8))

    def test_a_teacher_that_was_shown_other_pixels(
        self, tiny_backbone: Backbones, teacher: Path, tmp_path: Path
    ) -> None:
        model = load_classifier(teacher)
        path = tmp_path / "classifier.safetensors"
        about = model.description | {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
        save_classifier(path, model, description=about)
        same = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
        self.build(tiny_backbone(), path, **same)
        with pytest.raises(ConfigError, match=r"data\.std=\[0\.2, 0\.2, 0\.2\], this run has \[0"):
            self.build(tiny_backbone(), path, **same | {"std": (0.2, 0.3, 0.2)})

    @pytest.mark.parametrize("mean", [[0.5], ["a", "b", "c"], [0.5, None, 0.5], "grey", 0.5])
    def test_a_teacher_whose_header_says_nonsense_of_the_pixels(
        self, tiny_backbone: Backbones, teacher: Path, tmp_path: Path, mean: Any
    ) -> None:
        model = load_classifier(teacher)
        path = tmp_path / "classifier.safetensors"
        save_classifier(path, model, description=model.description | {"mean": mean})
        with pytest.raises(DataError, match=r"classifier\.safetensors: its header has mean="):
            self.build(tiny_backbone(), path, mean=(0.5, 0.5, 0.5))

    def test_a_teacher_that_is_not_there(self, tiny_backbone: Backbones, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"classifier\.safetensors: no such file; it should"):
            self.build(tiny_backbone(), tmp_path)

    def test_a_teacher_that_is_something_else(
        self, tiny_backbone: Backbones, tmp_path: Path
    ) -> None:
        path = tmp_path / "classifier.safetensors"
        path.write_bytes(pickle.dumps({"weights": 1}))
        with pytest.raises(DataError, match="not a safetensors file"):
            self.build(tiny_backbone(), path)
        write_network(path, {"a": torch.ones(2)}, kind="raysl-encoder-1", description={})
        with pytest.raises(DataError, match="safetensors, but not the classifier of a fine-tuned"):
            self.build(tiny_backbone(), path)
