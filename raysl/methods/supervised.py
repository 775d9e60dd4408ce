"""Supervised training, from scratch or from a pretrained encoder and the first layers of its head.

T. Chen, S. Kornblith, K. Swersky, M. Norouzi, G. Hinton: "Big Self-Supervised Models are Strong
Semi-Supervised Learners", 2020, arXiv:2006.10029v2 (SimCLR v2), sec. 2, fine-tuning.
"""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysl.config.base import NonNegativeFloat
from raysl.errors import ConfigError, ShapeError
from raysl.methods.base import (
    Batch,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    RunShape,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.classifier import Classifier, load_head
from raysl.nn.heads import first_layers
from raysl.nn.mixing import mix_batch
from raysl.nn.precision import at_least_float32


def supervised_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Compute the cross entropy of the classes.

    .. math::
        L = -\frac{1}{N} \sum_i \sum_y q_i(y) \log P(y | x_i), \quad
        q_i = (1 - \epsilon) t_i + \epsilon / C

    Args:
        logits: ``(N, C)``, any float dtype.
        targets: ``(N,)`` int64 class numbers, or ``(N, C)`` probabilities t.
        label_smoothing: epsilon, in [0, 1) (C. Szegedy et al. 2015, arXiv:1512.00567v3, sec. 7).

    Returns:
        Scalar >= 0, float32 (float64 for float64 logits). Equal logits give log C.

    Raises:
        ShapeError: If the shapes do not fit.
    """
    if logits.ndim != 2 or targets.shape not in (logits.shape[:1], logits.shape):
        raise ShapeError(
            f"logits must be (N, C), targets (N,) or (N, C); got {tuple(logits.shape)}, "
            f"{tuple(targets.shape)}"
        )
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(at_least_float32(logits), targets, label_smoothing=label_smoothing)


class SupervisedConfig(MethodConfig):
    """Settings of supervised training; ``backbone.weights`` sets the initial weights."""

    name: Literal["supervised"] = "supervised"
    needs_labels: ClassVar[bool] = True
    classifies: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = ("head",)
    head: str | None = None
    """A pretrained run folder, or its projection_head.safetensors; null for none."""
    head_layers: Annotated[int, Field(ge=0)] = 0
    """Number of layers of the projection head to keep on the encoder, with batch norm and
    nonlinearity: 0 is SimCLR's fine-tuning, 1 that of version 2 with few labels and a head of three
    layers."""
    freeze_encoder: bool = False
    """Only train the classifier and the kept layers, on features of an encoder in evaluation mode:
    with head_layers 0, linear evaluation with random crops."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target that is spread evenly over all classes."""
    mixup: NonNegativeFloat = 0.0
    """alpha of mixup (MAE fine-tunes ViTs with 0.8); 0 is off."""
    cutmix: NonNegativeFloat = 0.0
    """alpha of cutmix (MAE: 1.0); with both, each batch gets one of them."""

    @property
    def num_views(self) -> int:
        """One view: a crop and a flip (SimCLR v2, sec. 3.1)."""
        return 1

    @property
    def uses_labels(self) -> bool:
        """True: the loss needs labels."""
        return True

    @model_validator(mode="after")
    def _layers_need_a_head(self) -> "SupervisedConfig":
        if self.head_layers and self.head is None:
            raise ValueError(
                f"head_layers={self.head_layers} needs a projection head: set head to a pretrained "
                f"run folder, or head_layers=0"
            )
        return self

    def check(self, shape: RunShape) -> None:
        """Reject freezing a random encoder."""
        if self.freeze_encoder and shape.backbone.weights is None:
            raise ConfigError(
                "method.freeze_encoder=true trains a classifier on random features; set "
                "backbone.weights"
            )


class Supervised(Method):
    """Train an encoder and a linear classifier on labels.

    All parameters are trained, unless ``freeze_encoder``. The classifier is initialised with
    normals of standard deviation 0.01, and LARS does not adapt it, as in the SimCLR authors' code.
    """

    Config = SupervisedConfig
    loss_is_mean_over_images = True

    def __init__(self, config: SupervisedConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.config = config
        self.network = Classifier(backbone, _load_head_layers(config, backbone), class_names(data))
        if config.freeze_encoder:
            backbone.requires_grad_(False)

    @property
    def encoder(self) -> Backbone:
        """The backbone, without the kept layers of the head and the classifier."""
        return self.network.encoder

    @property
    def label_classifier(self) -> Classifier:
        """The encoder, the kept layers of the head and the linear classifier."""
        return self.network

    @property
    def unadapted_modules(self) -> tuple[nn.Module, ...]:
        """The linear classifier."""
        return (self.network.linear,)

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Return the cross entropy of the classes, from one view of each image."""
        images, labels = batch.views[0], batch.labels
        assert labels is not None
        targets = labels
        if self.training and (self.config.mixup > 0 or self.config.cutmix > 0):
            targets = F.one_hot(labels, len(self.network.class_names)).to(images.dtype)
            mixing = {"mixup": self.config.mixup, "cutmix": self.config.cutmix}
            images, targets = mix_batch(images, targets, **mixing)
        features = self._features(images)
        logits = self.network.logits(features)
        loss = supervised_loss(logits, targets, label_smoothing=self.config.label_smoothing)
        if not progress.is_logged:
            return LossOutput(loss, features.detach(), {})
        with torch.no_grad():
            classes = targets if targets.ndim == 1 else targets.argmax(dim=1)
            probabilities = logits.float().softmax(dim=1)
            metrics = {
                "supervised/accuracy": (logits.argmax(dim=1) == classes).float().mean(),
                "supervised/confidence": probabilities.amax(dim=1).mean(),
            }
        return LossOutput(loss, features.detach(), metrics)

    def _features(self, images: Tensor) -> Tensor:
        if not self.config.freeze_encoder:
            return self.encoder(images)  # type: ignore[no-any-return]
        self.encoder.eval()  # whatever mode the loop has set
        with torch.no_grad():
            return self.encoder(images)  # type: ignore[no-any-return]


def _load_head_layers(config: SupervisedConfig, backbone: Backbone) -> nn.Sequential:
    """Return the first layers of the configured head; empty if none are kept."""
    if config.head is None or not config.head_layers:
        return nn.Sequential()
    full_head = load_head(config.head)
    try:
        head = first_layers(full_head, config.head_layers)
    except ConfigError as error:
        raise ConfigError(f"method.head_layers: {config.head}: {error}") from None
    first = head[0]
    if not isinstance(first, nn.Linear):
        raise ConfigError(
            f"method.head={config.head}: begins with a {type(first).__name__}, not with a linear "
            f"layer; set method.head_layers=0"
        )
    inputs = first.in_features
    if inputs != backbone.embed_dim:
        raise ConfigError(
            f"method.head={config.head}: takes {inputs} features, the backbone gives "
            f"{backbone.embed_dim}; give the head of the run that backbone.weights names"
        )
    return head.requires_grad_(True)


def class_names(data: TrainingSet) -> tuple[str, ...]:
    """Return the names of the classes.

    Raises:
        ConfigError: If there are no labels.
    """
    if data.class_counts is None:
        raise ConfigError("method supervised needs labels; the training images have none")
    return data.class_names or tuple(str(number) for number in range(len(data.class_counts)))


METHOD = Supervised
