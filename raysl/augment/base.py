"""The base classes of augmentation operations, and what their batched versions share.

An operation is planned first, which draws all random numbers and sees no pixels, and then applied,
which draws none. Data workers import this package and must not load torch: code for the
accelerator imports it inside functions only.
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
    """A random transform of a view's pixels, which only the CPU can run.

    A subclass defines its settings, :meth:`draw` unless it has no parameters, and
    :meth:`transform`.
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
        """Draw the parameters of one transform; True if there are none."""
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

    Data workers still draw the plans, so the views equal those of the CPU up to rounding: the
    batched version rounds to whole levels like its uint8 counterpart and differs from it by 0.03
    levels on average; the hue, which OpenCV quantises to 256 steps, by 0.2.

    A subclass also defines :meth:`transform_batch`, and :attr:`num_params` and :meth:`to_numbers`
    unless it has no parameters.
    """

    num_params: ClassVar[int] = 0
    """Number of values that :meth:`to_numbers` returns."""

    def plan_numbers(self, plan: Any, *, size_px: int) -> tuple[float, ...]:
        """Return a plan as 1 and its parameters, or as zeros if it is None.

        Args:
            plan: The result of :meth:`plan`.
            size_px: Side of the view.
        """
        if plan is None:
            return (0.0,) * (1 + self.num_params)
        return (1.0, *self.to_numbers(plan, size_px))

    def apply_batch(self, images: "Tensor", numbers: Floats) -> "Tensor":
        """Apply the plans of a batch.

        Args:
            images: ``(N, 3, S, S)`` float32 on the device, whole levels in [0, 255]; not written
                to.
            numbers: ``(N, 1 + num_params)`` float32 on the CPU, from :meth:`plan_numbers`.

        Returns:
            ``(N, 3, S, S)`` float32, whole levels in [0, 255].
        """
        rows = np.flatnonzero(numbers[:, 0])
        if len(rows) == 0:
            return images
        index, params = to_device(rows, images), np.ascontiguousarray(numbers[rows, 1:])
        return images.index_copy(0, index, self.transform_batch(images[index], params))

    def to_numbers(self, params: Any, size_px: int, /) -> tuple[float, ...]:
        """Return the parameters as numbers, for a view of ``size_px``."""
        return ()

    @abstractmethod
    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Transform every image.

        Args:
            images: ``(N, 3, S, S)`` float32 on the device, whole levels in [0, 255]; must not be
                written to.
            params: ``(N, num_params)`` float32 on the CPU, from :meth:`to_numbers`.

        Returns:
            ``(N, 3, S, S)`` float32, whole levels in [0, 255].
        """


def to_device(array: npt.NDArray[Any], images: "Tensor") -> "Tensor":
    """Copy an array to the device of ``images``."""
    import torch  # noqa: PLC0415 - data workers load this module, and no torch

    return torch.from_numpy(array).to(images.device, non_blocking=True)


def to_levels(images: "Tensor") -> "Tensor":
    """Round to whole levels and clamp to [0, 255]."""
    return images.round().clamp(0, 255)


def to_luma(images: "Tensor") -> "Tensor":
    """Return the luma of ``(N, 3, S, S)`` as ``(N, 1, S, S)``, not rounded."""
    return (images * to_device(LUMA, images).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
