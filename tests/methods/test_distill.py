import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raysl.errors import ConfigError, DataError, ShapeError
from raysl.methods.base import Batch, Progress, RunShape, TrainingSet
from raysl.methods.distill import Distill, DistillConfig, distillation_loss, known_label_loss
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.classifier import load_classifier, save_classifier

NAMES = ("0", "1", "2")
DATA = TrainingSet(64, 8, (32,), class_counts=(3, 3, 2), class_names=NAMES)
LABELS = torch.tensor([0, -1, 2, -1, 1, -1, -1, 0])


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


class TestLoss:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
    def test_is_equation_2_in_loops(self, temperature: float) -> None:
        student, teacher = double(5, 4), double(5, 4, seed=1)
        total = 0.0
        for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
            for p, q in zip(softmax(theirs, temperature), softmax(ours, temperature), strict=True):
                total -= p * math.log(q)
        found = distillation_loss(student, teacher, temperature=temperature)
        assert float(found) == pytest.approx(total / 5, rel=1e-12)

    def test_hard_targets_are_what_a_cold_teacher_says(self) -> None:
        student, teacher = double(5, 4), double(5, 4, seed=1)
        hard = distillation_loss(student, teacher, temperature=1.0, hard=True)
        cold = distillation_loss(student, 1e4 * teacher, temperature=1.0)
        torch.testing.assert_close(hard, cold)

    def test_is_least_where_the_student_agrees(self) -> None:
        teacher = double(5, 4, seed=1)
        student = teacher.clone().requires_grad_()
        distillation_loss(student, teacher, temperature=0.7).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        assert float(student.grad.abs().max()) < 1e-12

    def test_gradient_is_right_and_none_goes_to_the_teacher(self) -> None:
        student, teacher = double(4, 3).requires_grad_(), double(4, 3, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z: distillation_loss(z, teacher, temperature=0.5), student
        )
        distillation_loss(student, teacher, temperature=0.5).backward()  # type: ignore[no-untyped-call]
        assert teacher.grad is None

    def test_other_shapes_are_an_error(self) -> None:
        with pytest.raises(ShapeError, match=r"must both be \(N, C\)"):
            distillation_loss(torch.zeros(4, 3), torch.zeros(4, 2), temperature=1.0)

    def test_labels_that_are_not_known_do_not_count(self) -> None:
        logits = double(8, 3)
        known = LABELS >= 0
        expected = torch.nn.functional.cross_entropy(logits[known], LABELS[known])
        torch.testing.assert_close(known_label_loss(logits, LABELS), expected)
        assert float(known_label_loss(logits, torch.full((8,), -1))) == 0.0


class Made:
    def __init__(self, backbone: Callable[..., Backbone], teacher: Path) -> None:
        self._backbone = backbone
        self.teacher = teacher
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randn(8, 3, 32, 32, generator=generator)

    def method(self, data: TrainingSet = DATA, **settings: Any) -> Distill:
        backbone = self._backbone()
        torch.manual_seed(3)
        return Distill(DistillConfig(**{"teacher": str(self.teacher)} | settings), backbone, data)

    def batch(self, labels: Tensor | None = None) -> Batch:
        return Batch([self.images], torch.arange(8), labels)


@pytest.fixture
def made(tiny_backbone: Callable[..., Backbone], teacher: Path) -> Made:
    return Made(tiny_backbone, teacher)


class TestDistill:
    @pytest.mark.parametrize("targets", ["soft", "hard"])
    @pytest.mark.parametrize("squared", [False, True])
    def test_its_loss_is_the_weighted_sum(
        self, made: Made, progress: Progress, targets: str, squared: bool
    ) -> None:
        method = made.method(
            temperature=0.5,
            targets=targets,
            distillation_weight=0.7,
            temperature_squared=squared,
        )
        output = method(made.batch(LABELS), progress)
        ours = method.label_classifier(made.images)
        with torch.no_grad():
            theirs = load_classifier(made.teacher)(made.images)
        distil = distillation_loss(ours, theirs, temperature=0.5, hard=targets == "hard")
        scale = 0.25 if squared else 1.0
        expected = 0.3 * known_label_loss(ours, LABELS) + 0.7 * scale * distil
        torch.testing.assert_close(output.loss, expected)

    def test_without_a_share_of_theirs_labels_change_nothing(
        self, made: Made, progress: Progress
    ) -> None:
        assert not DistillConfig().uses_labels
        assert DistillConfig(distillation_weight=0.5).uses_labels
        losses = [made.method()(made.batch(labels), progress).loss for labels in (None, LABELS)]
        assert torch.equal(losses[0], losses[1])

    def test_the_teacher_stays_as_it_is_and_is_in_no_checkpoint(
        self, made: Made, progress: Progress
    ) -> None:
        method = made.method().train()
        before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
        method(made.batch(), progress).loss.backward()
        assert not method.teacher.training
        for name, value in method.teacher.state_dict().items():
            assert torch.equal(value, before[name]), name
        theirs = {id(p) for p in method.teacher.parameters()}
        assert not theirs & {id(p) for p in method.parameters()}
        assert not any("teacher" in name for name in method.state_dict())
        assert all(p.grad is None for p in method.teacher.parameters())

    def test_the_teacher_goes_along_to_another_dtype(self, made: Made) -> None:
        method = made.method().double()
        assert {p.dtype for p in method.teacher.parameters()} == {torch.float64}

    def test_the_student_does_not_depend_on_how_large_the_teacher_is(self, made: Made) -> None:
        """Loading one draws no random numbers."""
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        load_classifier(made.teacher)
        assert torch.equal(torch.rand(3), expected)


class TestErrors:
    def test_a_teacher_is_missing(self, made: Made) -> None:
        shape = RunShape(8, 1, (32,), BackboneConfig(name="resnet18"))
        with pytest.raises(ConfigError, match=r"method\.teacher: missing; give the folder"):
            DistillConfig().check_shape(shape)
        with pytest.raises(ConfigError, match=r"method\.teacher: missing"):
            made.method(teacher=None)

    def test_a_teacher_is_not_there(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such file; it should be the classifier of a fine"):
            made.method(teacher=str(tmp_path))

    def test_a_teacher_of_other_classes(self, made: Made) -> None:
        with pytest.raises(
            ConfigError, match="knows the classes 0, 1, 2, the training images have"
        ):
            made.method(DATA._replace(class_names=("a", "1", "2")))

    def test_a_teacher_that_saw_other_pixels(self, made: Made, teacher: Path) -> None:
        model = load_classifier(teacher)
        path = teacher.with_name("other.safetensors")
        save_classifier(path, model, description=model.description | {"mean": [0.5, 0.5, 0.5]})
        data = DATA._replace(mean=(0.4, 0.5, 0.5), std=(0.2, 0.2, 0.2))
        with pytest.raises(ConfigError, match=r"data\.mean=\[0\.5, 0\.5, 0\.5\], this run has"):
            made.method(data, teacher=str(path))
