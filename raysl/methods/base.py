"""The interface of a method: views in, loss and metrics out; no Ray, no tracker, no optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from raysl.config.base import Config, Duration
from raysl.errors import ConfigError
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.classifier import Classifier


@dataclass(frozen=True)
class Batch:
    """This rank's images of one optimizer step, on the device."""

    views: Sequence[Tensor]
    """One normalised ``(N, 3, S, S)`` float tensor per view; row i of every view is image i."""
    index: Tensor
    """``(N,)`` int64: the rows of the training source that the images come from."""
    labels: Tensor | None = None
    """``(N,)`` int64 class numbers, -1 where unknown; None if the source has none or the method
    does not use them (:attr:`MethodConfig.uses_labels`)."""


class Progress(NamedTuple):
    """The state of training at a step; schedules and random numbers depend on it alone."""

    step: int  # optimizer steps done
    total_steps: int
    steps_per_epoch: int
    seed: int
    is_logged: bool = True  # whether the metrics of this step are read

    @property
    def epoch(self) -> float:
        """Number of epochs done."""
        return self.step / self.steps_per_epoch

    def in_steps(self, duration: Duration) -> int:
        """Convert a duration to optimizer steps of this run."""
        return duration.in_steps(steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)

    def shared_generator(self) -> torch.Generator:
        """Return a CPU generator with the same numbers on every rank at this step."""
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + self.step) % (1 << 63))
        return generator


class RunShape(NamedTuple):
    """The properties of a run that follow from its configuration, for a method to check."""

    global_batch_size: int
    num_workers: int
    view_sizes_px: tuple[int, ...]
    """Side of each view, in the order of ``Batch.views``."""
    backbone: BackboneConfig


class TrainingSet(NamedTuple):
    """The properties of the training images that a method is given at its construction."""

    num_images: int
    """Number of rows of the source; ``Batch.index`` is smaller."""
    global_batch_size: int
    view_sizes_px: tuple[int, ...]
    class_counts: tuple[int, ...] | None = None
    """Number of images of each class, if there are labels and the method uses them."""
    class_names: tuple[str, ...] = ()
    """Class names, by number."""
    mean: tuple[float, ...] | None = None
    """The mean subtracted from the channels of the views; None if unknown."""
    std: tuple[float, ...] | None = None
    """The standard deviation that they are then divided by; None if unknown."""


class SizeDefault(NamedTuple):
    """A setting derived from the size of the data set, and its formula."""

    value: float
    formula: str  # such as "min(65,536, images) = 10,000"


class LossOutput(NamedTuple):
    """The results of one batch; all tensors stay on the device."""

    loss: Tensor  # scalar to minimise
    features: Tensor  # (N, embed_dim) of one view, detached; input of the health metrics
    metrics: dict[str, Tensor]  # detached scalars by name; empty if the step is not logged
    adversary_loss: Tensor | None = None
    """Scalar that the adversary minimises, if there is one (:attr:`Method.adversary`)."""


class ImageGrid(NamedTuple):
    """A picture that a method makes of a batch, for the report."""

    images: Tensor
    """``(rows, columns, 3, S, S)`` float, normalised like the views, or in [0, 1]."""
    columns: tuple[str, ...]
    """A title for each column; empty for none."""
    caption: str
    normalised: bool = True
    """False if the values are colours in [0, 1], such as those of a heat map."""


class MethodConfig(Config):
    """The settings of a method; ``name`` is the name of its file."""

    name: str
    takes_more_views: ClassVar[bool] = False
    """Whether it accepts views beyond :attr:`num_views` (the small ones of multi-crop)."""
    needs_vit: ClassVar[bool] = False
    """Whether the backbone must be a vision transformer."""
    compares_images: ClassVar[bool] = False
    """Whether the loss compares the images of a batch, so that a batch of one is useless."""
    needs_labels: ClassVar[bool] = False
    """Whether it only uses labelled images, so that others are left out."""
    classifies: ClassVar[bool] = False
    """Whether it trains a classifier (:attr:`Method.label_classifier`), whose accuracy is then
    measured instead of that of frozen features."""
    finetuned_pool: ClassVar[str | None] = None
    """Value of ``backbone.pool`` for fine-tuning all of the encoder; None keeps it."""
    beginnings: ClassVar[tuple[str, ...]] = ()
    """Settings that are durations of an initial phase, which must end before the run does."""
    starts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Settings that are start times within a run, by the setting that enables each."""
    files: ClassVar[tuple[str, ...]] = ()
    """Settings that name a run folder or a file, which every worker must be able to read."""

    @property
    def num_views(self) -> int:
        """Number of views of an image that the method takes."""
        return 2

    @property
    def uses_labels(self) -> bool:
        """Whether the method receives labels if the source has them."""
        return False

    @property
    def norms_images(self) -> bool:
        """Whether batch norm in the method's heads normalises over images.

        Each image yields one vector (or one per view), so a single image would be normalised to
        zero.
        """
        return False

    @property
    def has_adversary(self) -> bool:
        """Whether there is an adversary (:attr:`Method.adversary`) with an optimizer of its own."""
        return False

    def projection_head_layers(self, *, is_vit: bool) -> int:
        """Return the number of linear layers of :attr:`Method.projection_head`.

        Args:
            is_vit: Whether the backbone is one of raysl's vision transformers.
        """
        return 0

    def check(self, shape: RunShape) -> None:
        """Raise ConfigError if the method cannot train in this run."""

    def size_defaults(self, data: TrainingSet) -> Mapping[str, SizeDefault]:
        """Return the null settings that follow from the data set, by field."""
        return {}

    @final
    def check_shape(self, shape: RunShape) -> None:
        """Check the rules that all methods share, then :meth:`check`.

        Raises:
            ConfigError: If the method cannot train in this run.
        """
        views, least = len(shape.view_sizes_px), self.num_views
        if views < least or (views > least and not self.takes_more_views):
            raise ConfigError(
                f"method {self.name} takes {least}{' or more' if self.takes_more_views else ''} "
                f"views of an image; data.views makes {views}"
            )
        if self.needs_vit and not shape.backbone.is_vit:
            raise ConfigError(
                f"method {self.name} needs a vision transformer; backbone.name="
                f"{shape.backbone.name}. Use vit_tiny, vit_small or vit_base"
            )
        if self.compares_images and shape.global_batch_size < 2:
            raise ConfigError(
                f"method {self.name} compares the images of a batch with each other; "
                f"train.global_batch_size={shape.global_batch_size}, use 2 or more"
            )
        self.check(shape)


class Method(nn.Module, ABC):
    """A self-supervised method with a backbone.

    Data-parallel training synchronises gradients in ``forward``, so the loop calls the module,
    which only calls :meth:`loss`.

    Args:
        config: The method's settings.
        backbone: The encoder to train.
        data: Properties of the training images.
    """

    Config: ClassVar[type[MethodConfig]]
    loss_is_mean_over_images: ClassVar[bool] = False
    """Whether the loss of a batch is the mean of its parts' losses (apart from batch norm), so that
    gradients may be accumulated over micro-batches."""

    @abstractmethod
    def __init__(self, config: MethodConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__()

    @property
    @abstractmethod
    def encoder(self) -> Backbone:
        """The backbone to evaluate and export."""

    @property
    def projection_head(self) -> nn.Sequential | None:
        """The head on :attr:`encoder`, whose first layers fine-tuning may keep; None for none."""
        return None

    @property
    def label_classifier(self) -> Classifier | None:
        """The classifier around :attr:`encoder`; None for methods without one."""
        return None

    @property
    def adversary(self) -> nn.Module | None:
        """The submodule that has an optimizer of its own, for ``LossOutput.adversary_loss``.

        The method ensures that neither loss has a gradient in the other's parameters: both are
        differentiated in one backward pass.
        """
        return None

    @property
    def constant_lr_modules(self) -> Sequence[nn.Module]:
        """Submodules whose learning rate stays at its peak (SimSiam's predictor)."""
        return ()

    @property
    def unadapted_modules(self) -> Sequence[nn.Module]:
        """Submodules that LARS treats like biases: unadapted and without decay (classifiers)."""
        return ()

    @abstractmethod
    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Compute the loss of this rank's images.

        Args:
            batch: This rank's images.
            progress: The state of training at this step.
        """

    def before_optimizer_step(self, progress: Progress) -> None:
        """Change gradients after the backward pass, such as to freeze a last layer at first."""

    def after_optimizer_step(self, progress: Progress) -> None:
        """Update state that the optimizer does not, such as moving averages and queues."""

    def pictures(self, batch: Batch, progress: Progress) -> Mapping[str, ImageGrid]:
        """Return pictures that show what the method does, by name; called in evaluation mode.

        Args:
            batch: A few training images.
            progress: The state at the end of the run.
        """
        return {}

    @final  # type: ignore[misc] # torch declares forward as an attribute
    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """Call :meth:`loss`."""
        return self.loss(batch, progress)


class EmbeddingMethod(Method):
    """A method whose loss compares images through one embedding each.

    Its gradient can be cached: the loop embeds a large batch in parts, differentiates the loss of
    all embeddings once, and embeds each part again to propagate the gradient.
    """

    @abstractmethod
    def embeddings(self, batch: Batch, progress: Progress) -> tuple[Tensor, ...]:
        """Return the features of one view, detached, followed by the inputs of the loss.

        Each is ``(N, ...)`` with one row per image. Random numbers and state changes must be the
        same if the same part of the batch is embedded twice in one step (torch's global generator
        is restored for this).
        """

    @abstractmethod
    def loss_of(
        self, embeddings: tuple[Tensor, ...], batch: Batch, progress: Progress
    ) -> LossOutput:
        """Compute the loss from the embeddings of all of this rank's images."""

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Embed the images, then compute the loss from the embeddings."""
        return self.loss_of(self.embeddings(batch, progress), batch, progress)


class SiameseMethod(EmbeddingMethod):
    """A method that compares the projections of two views by one backbone and one projector.

    Args:
        config: The method's settings.
        backbone: The encoder to train.
        data: Properties of the training images.
        projector: The head on the backbone, ``(N, embed_dim)`` -> ``(N, D)``.
    """

    norms_views_together: ClassVar[bool]
    """Whether batch norm computes its statistics over both views together, or over each."""

    def __init__(
        self,
        config: MethodConfig,
        backbone: Backbone,
        data: TrainingSet,
        *,
        projector: nn.Sequential,
    ) -> None:
        super().__init__(config, backbone, data)
        self.backbone = backbone
        self.projector = projector

    @property
    def encoder(self) -> Backbone:
        """The backbone without the projector."""
        return self.backbone

    @property
    def projection_head(self) -> nn.Sequential:
        """The projector."""
        return self.projector

    def embeddings(self, batch: Batch, progress: Progress) -> tuple[Tensor, ...]:
        """Return features of view 0 and the projections of both views."""
        if self.norms_views_together:
            n = len(batch.views[0])
            features = self.backbone(torch.cat(list(batch.views)))  # (2N, embed_dim)
            return features[:n].detach(), *self.projector(features).split(n)
        by_view = [self.backbone(view) for view in batch.views]
        return by_view[0].detach(), *(self.projector(features) for features in by_view)


def at_most_dataset(value: int, data: TrainingSet) -> SizeDefault:
    """Return the smaller of a length and the number of training images, with its formula."""
    least = min(value, data.num_images)
    return SizeDefault(least, f"min({value:,}, {data.num_images:,} images) = {least:,}")
