"""What a method is: views in, a loss and metrics out; no Ray, no tracker, no optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from raysl.config.base import Config
from raysl.nn.backbones import Backbone


class Progress(NamedTuple):
    """Where training stands; schedules and random numbers are functions of it."""

    step: int  # optimizer steps done
    total_steps: int
    steps_per_epoch: int
    seed: int

    def shared_generator(self) -> torch.Generator:
        """Return a CPU generator that gives every rank the same numbers at this step."""
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + self.step) % (1 << 63))
        return generator


class LossOutput(NamedTuple):
    """What one batch gives; all of it stays on the device."""

    loss: Tensor  # scalar to minimise
    features: Tensor  # (N, embed_dim) of one view, detached: health metrics are taken from it
    metrics: dict[str, Tensor]  # detached scalars by name


class MethodConfig(Config):
    """The settings of a method; its ``name`` is the name of its file."""

    name: str

    @property
    def num_views(self) -> int:
        """Views of an image that the method takes."""
        return 2

    def check(self, *, global_batch_size: int, num_workers: int) -> None:
        """Raise ConfigError if the method cannot run with this batch on so many workers."""


class Method(nn.Module, ABC):
    """A self-supervised method around a backbone.

    Data-parallel training synchronises gradients in ``forward``, so the loop calls the module, and
    the module only calls :meth:`loss`.
    """

    Config: ClassVar[type[MethodConfig]]

    @abstractmethod
    def __init__(self, config: MethodConfig, backbone: Backbone) -> None:
        super().__init__()

    @property
    @abstractmethod
    def encoder(self) -> Backbone:
        """The backbone that is evaluated and exported."""

    @abstractmethod
    def loss(self, views: Sequence[Tensor], progress: Progress) -> LossOutput:
        """Compute the loss of this rank's images.

        Args:
            views: One ``(N, 3, S, S)`` float tensor a view, normalised; row i of each comes from
                the same image.
            progress: Where training stands.
        """

    def after_optimizer_step(self, progress: Progress) -> None:
        """Update what gradients do not: moving averages, queues."""

    @final  # type: ignore[misc] # torch declares forward as an attribute
    def forward(self, views: Sequence[Tensor], progress: Progress) -> LossOutput:
        """Call :meth:`loss`."""
        return self.loss(views, progress)
