"""Distillation: a student learns a fine-tuned teacher's predictions on unlabelled images.

T. Chen, S. Kornblith, K. Swersky, M. Norouzi, G. Hinton: "Big Self-Supervised Models are Strong
Semi-Supervised Learners", 2020, arXiv:2006.10029v2 (SimCLR v2), sec. 2, self-training.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.config.base import Idle, PositiveFloat, Probability
from raysl.errors import ConfigError, DataError, ShapeError
from raysl.methods.base import (
    Batch,
    EmbeddingMethod,
    LossOutput,
    MethodConfig,
    Progress,
    RunShape,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.classifier import Classifier, load_classifier
from raysl.nn.collectives import mean_over_ranks
from raysl.nn.geometry import entropy
from raysl.nn.precision import at_least_float32

_CHANNELS = 3
_TOLERANCE = 1e-6  # for mean and standard deviation of the pixels


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, hard: bool = False
) -> Tensor:
    r"""Compute the cross entropy of the student's predictions with the teacher's.

    .. math::
        L = -\frac{1}{N} \sum_i \sum_y P^T(y | x_i; \tau) \log P^S(y | x_i; \tau), \quad
        P(y | x_i; \tau) = \frac{\exp(f(x_i)[y] / \tau)}{\sum_{y'} \exp(f(x_i)[y'] / \tau)}

    Args:
        student: Logits ``(N, C)``, any float dtype.
        teacher: Logits of the same shape; they get no gradient.
        temperature: tau, > 0, of both.
        hard: Use the teacher's best class as the target (pseudo-labels).

    Returns:
        Scalar, float32 (float64 for float64 logits); at least the entropy of the teacher.

    Raises:
        ShapeError: If the shapes differ.

    Source: Eq. (2) and the definition below it. Departs: the mean over images, where the paper has
    their sum.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ShapeError(
            f"student and teacher must both be (N, C); got {tuple(student.shape)}, "
            f"{tuple(teacher.shape)}"
        )
    with torch.autocast(student.device.type, enabled=False):
        student_logits = at_least_float32(student) / temperature
        teacher_logits = at_least_float32(teacher.detach()) / temperature
        targets = teacher_logits.argmax(dim=1) if hard else teacher_logits.softmax(dim=1)
        return F.cross_entropy(student_logits, targets)


def known_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross entropy of the known labels, over the batch of all ranks.

    Args:
        logits: ``(N, C)``, any float dtype.
        labels: ``(N,)`` int64, -1 where unknown.

    Returns:
        Scalar whose mean over ranks, which data-parallel training minimises, is the mean over the
        labelled images of all ranks; 0 if there are none.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        num_labelled = mean_over_ranks((labels >= 0).sum().to(logits.dtype))
        return total / torch.where(num_labelled > 0, num_labelled, 1.0)


class DistillConfig(MethodConfig):
    """Settings of distillation; ``backbone`` is the student."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("temperature_squared",), {"temperature": (1,)}),)
    name: Literal["distill"] = "distill"
    classifies: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = ("teacher",)
    teacher: str | None = None
    """The folder of a run of method supervised or distill, or its classifier.safetensors. The
    teacher is not trained, and runs in evaluation mode."""
    temperature: PositiveFloat = 1.0
    """tau of teacher and student: 0.1 for a student of the same architecture, 1 for a smaller one;
    the paper finds little difference (sec. 3.1)."""
    targets: Literal["soft", "hard"] = "soft"
    """soft: the teacher's probabilities. hard: its best class (pseudo-labels)."""
    distillation_weight: Probability = 1.0
    """alpha of Eq. (3): 1, the paper's default, uses no labels; below it, the labels that
    data.labels allows are weighted with 1 - alpha."""
    temperature_squared: bool = False
    """Multiply the distillation loss by tau squared, which keeps the size of its gradient for any
    tau (Hinton et al. 2015, arXiv:1503.02531v1, sec. 2; so does the authors' notebook, at tau = 1).
    The paper's Eq. (2) does not; LARS and AdamW are barely affected."""

    @property
    def num_views(self) -> int:
        """One view, which teacher and student see: a crop and a flip (sec. 3.1)."""
        return 1

    @property
    def uses_labels(self) -> bool:
        """Whether labels have a weight in the loss."""
        return self.distillation_weight < 1

    def check(self, shape: RunShape) -> None:
        """Reject settings without a teacher."""
        if self.teacher is None:
            raise ConfigError(
                "method.teacher: missing; give the folder of a fine-tuned run, such as "
                "runs/NAME-finetuned"
            )


class Distill(EmbeddingMethod):
    """A student, an encoder and a linear classifier, imitates a teacher.

    The teacher is not a submodule: it is in no checkpoint and in no exported file.
    """

    Config = DistillConfig

    def __init__(self, config: DistillConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        if config.teacher is None:
            raise ConfigError("method.teacher: missing; give the folder of a fine-tuned run")
        teacher = load_classifier(config.teacher).requires_grad_(False)
        _check_fit(teacher, config.teacher, data)
        # In a tuple, so that torch does not register it as a submodule.
        self._teacher = (teacher,)
        self.network = Classifier(backbone, nn.Sequential(), teacher.class_names)

    @property
    def teacher(self) -> Classifier:
        """The teacher."""
        return self._teacher[0]

    @property
    def encoder(self) -> Backbone:
        """The student's encoder, without its classifier."""
        return self.network.encoder

    @property
    def label_classifier(self) -> Classifier:
        """The student."""
        return self.network

    @property
    def unadapted_modules(self) -> tuple[nn.Module, ...]:
        """The student's linear classifier."""
        return (self.network.linear,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Also move the teacher to another device, dtype or memory layout."""
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def embeddings(self, batch: Batch, progress: Progress) -> tuple[Tensor, ...]:
        """Return the student's features and logits, and the teacher's logits."""
        images = batch.views[0]
        features = self.encoder(images)
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        return features.detach(), self.network.logits(features), teacher_logits

    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Combine the losses of the teacher's predictions and of the labels.

        Source: Eq. (3). Departs: means over images, where the paper has sums over the two data
        sets; the weight then includes their ratio.
        """
        features, student_logits, teacher_logits = embeddings
        config = self.config
        hard, alpha = config.targets == "hard", config.distillation_weight
        loss = distillation_loss(
            student_logits, teacher_logits, temperature=config.temperature, hard=hard
        )
        metrics = {"distill/loss": loss.detach()}
        if config.temperature_squared:
            loss = config.temperature**2 * loss
        if alpha < 1 and batch.labels is not None:
            labelled = known_label_loss(student_logits, batch.labels)
            metrics["distill/label_loss"] = labelled.detach()
            loss = (1 - alpha) * labelled + alpha * loss
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        with torch.no_grad():
            agrees = student_logits.argmax(1) == teacher_logits.argmax(1)
            confidence = teacher_logits.float().softmax(dim=1).amax(dim=1)
            softened = (teacher_logits.float() / config.temperature).softmax(dim=1)
            metrics |= {
                "distill/agreement": agrees.float().mean(),
                "distill/teacher_confidence": confidence.mean(),
                # Lower bound of the loss with soft targets.
                "distill/teacher_entropy": entropy(softened),
            }
        return LossOutput(loss, features, metrics)


def _check_fit(teacher: Classifier, path: str, data: TrainingSet) -> None:
    """Reject a teacher with other classes, or one trained with another normalisation."""
    if data.class_names and list(data.class_names) != teacher.class_names:
        raise ConfigError(
            f"method.teacher={path}: knows the classes {_list_names(teacher.class_names)}, the "
            f"training images have {_list_names(data.class_names)}; give a teacher of the same "
            f"classes"
        )
    num_known, num_classes = len(teacher.class_names), len(data.class_counts or ())
    if num_classes > num_known:
        raise ConfigError(
            f"method.teacher={path}: knows {num_known} classes, the training images have "
            f"{num_classes}; give a teacher of the same classes"
        )
    for name, pixels in (("mean", data.mean), ("std", data.std)):
        teacher_value = teacher.description.get(name)
        if pixels is None or teacher_value is None:
            continue
        if not _are_channels(teacher_value):
            raise DataError(
                f"method.teacher={path}: its header has {name}={teacher_value!r}, not one "
                f"number per channel"
            )
        if any(abs(a - b) > _TOLERANCE for a, b in zip(pixels, teacher_value, strict=True)):
            raise ConfigError(
                f"method.teacher={path}: was trained with data.{name}={teacher_value}, this run "
                f"has {list(pixels)}; set data.{name} to the teacher's"
            )


def _are_channels(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) == _CHANNELS
        and all(isinstance(value, int | float) for value in values)
    )


def _list_names(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


METHOD = Distill
