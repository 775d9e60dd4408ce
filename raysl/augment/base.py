"""Base classes of augmentation operations, and helpers of their batched versions.

An operation runs in two steps: planning draws all random numbers and sees no pixels; applying the
plan draws no numbers. Data workers import this package and must not load torch, so code for the
accelerator imports torch inside functions only.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from raysl.augment.crop import Image
from raysl.config.base import Config, Probability

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float32]

# ITU-R 601-2 luma, as in PIL's convert("L") and OpenCV's RGB2GRAY.
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class Operation(Config):
    """A random transform of a view's pixels on the CPU.

    A subclass defines its settings and :meth:`transform`. If the transform has parameters, the
    subclass also defines :meth:`draw`.
    """

    op: str
    prob: Probability
    """Probability of applying the operation."""

    def plan(self, rng: np.random.Generator) -> Any:
        """Return the parameters of one transform, or None with probability 1 - prob."""
        return self.draw(rng) if rng.random() < self.prob else None

    def apply(self, image: Image, plan: Any) -> Image:
        """Return the transformed image, or the image itself if the plan is None.

        Args:
            image: ``(S, S, 3)`` uint8 RGB; not written to.
            plan: The result of :meth:`plan`.
        """
        return image if plan is None else self.transform(image, plan)

    def draw(self, rng: np.random.Generator, /) -> Any:
        """Draw the parameters of one transform. The default, True, means none."""
        return True

    @abstractmethod
    def transform(self, image: Image, params: Any, /) -> Image:
        """Return the transformed image.

        Args:
            image: ``(S, S, 3)`` uint8 RGB; must not be written to.
            params: The result of :meth:`draw`.
        """


class DeviceOperation(Operation):
    """An operation that the accelerator can also run, on a batch (``data.color_on: device``).

    The plan is drawn by a data worker in either case, so the views differ only by rounding. Both
    versions round to whole levels; their mean difference is 0.03 levels. For the hue it is 0.2,
    because OpenCV quantises the hue to 256 steps.

    A subclass also defines :meth:`transform_batch`. If the transform has parameters, the subclass
    also defines :attr:`num_params` and :meth:`to_numbers`.
    """

    num_params: ClassVar[int] = 0
    """Number of values that :meth:`to_numbers` returns."""

    def plan_numbers(self, plan: Any, *, size_px: int) -> tuple[float, ...]:
        """Convert a plan to numbers: 1 and the parameters, or only zeros for the plan None.

        Args:
            plan: The result of :meth:`plan`; None leaves the image unchanged.
            size_px: Side of the view in pixels.

        Returns:
            ``1 + num_params`` numbers.
        """
        if plan is None:
            return (0.0,) * (1 + self.num_params)
        return (1.0, *self.to_numbers(plan, size_px))

    def apply_batch(self, images: "Tensor", numbers: Floats) -> "Tensor":
        """Transform those images of a batch that have a plan; leave the others as they are.

        Args:
            images: ``(N, 3, S, S)`` float32 on the device, whole levels in [0, 255]; not written
                to.
            numbers: ``(N, 1 + num_params)`` float32 on the CPU: :meth:`plan_numbers` of each image.

        Returns:
            ``(N, 3, S, S)`` float32, whole levels in [0, 255].
        """
        rows = np.flatnonzero(numbers[:, 0])
        if len(rows) == 0:
            return images
        index, params = to_device(rows, images), np.ascontiguousarray(numbers[rows, 1:])
        return images.index_copy(0, index, self.transform_batch(images[index], params))

    def to_numbers(self, params: Any, size_px: int, /) -> tuple[float, ...]:
        """Convert parameters to ``num_params`` numbers, for a view of side ``size_px``."""
        return ()

    @abstractmethod
    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Transform every image.

        Args:
            images: ``(N, 3, S, S)`` float32 on the device, whole levels in [0, 255]; must not be
                written to.
            params: ``(N, num_params)`` float32 on the CPU: :meth:`to_numbers` of each image.

        Returns:
            ``(N, 3, S, S)`` float32, whole levels in [0, 255].
        """


def to_device(array: npt.NDArray[Any], images: "Tensor") -> "Tensor":
    """Copy an array to the device of ``images``."""
    import torch  # noqa: PLC0415 - data workers load this module but not torch

    return torch.from_numpy(array).to(images.device, non_blocking=True)


def to_levels(images: "Tensor") -> "Tensor":
    """Round pixels to whole levels and clamp them to [0, 255]."""
    return images.round().clamp(0, 255)


def to_luma(images: "Tensor") -> "Tensor":
    """Return the luma of images ``(N, 3, S, S)`` as ``(N, 1, S, S)``, without rounding."""
    return (images * to_device(LUMA, images).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
