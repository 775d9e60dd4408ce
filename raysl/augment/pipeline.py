"""Define a view as a crop and a sequence of operations; draw its plan, then apply the plan."""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from raysl.augment.base import DeviceOperation, Floats
from raysl.augment.crop import Crop, CropBox, Image, Interpolation, shrink_box
from raysl.augment.ops import Op
from raysl.augment.random import MAX_VIEWS, borrow_view_stream
from raysl.config.base import Config, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor


class View(Config):
    """The settings of one kind of view, drawn ``count`` times from each image."""

    count: Annotated[int, Field(gt=0, le=MAX_VIEWS)] = 1
    """Number of views of this kind."""
    size_px: PositiveInt = 224
    """Side of the view in pixels."""
    crop: Crop = Crop()
    ops: tuple[Op, ...] = ()
    """Operations, applied in this order."""


class ViewPlan(NamedTuple):
    """All random choices of one view: the image and this plan determine its pixels."""

    box: CropBox
    steps: tuple[Any, ...]  # one entry for each op of the view


def plan_view(view: View, rng: np.random.Generator, *, height: int, width: int) -> ViewPlan:
    """Draw the plan of a view for an image of ``height`` x ``width`` pixels."""
    box = view.crop.plan(rng, height=height, width=width)
    return ViewPlan(box, tuple(op.plan(rng) for op in view.ops))


def apply_view(view: View, image: Image, plan: ViewPlan, *, num_ops: int | None = None) -> Image:
    """Apply a plan to an image.

    Args:
        view: The kind of view that the plan was drawn for.
        image: ``(H, W, 3)`` uint8 RGB.
        plan: The result of :func:`plan_view`.
        num_ops: Stop after this many operations; None for all.

    Returns:
        ``(size_px, size_px, 3)`` uint8; may share memory with ``image`` if nothing changes.
    """
    result = view.crop.apply(image, plan.box, size_px=view.size_px)
    for op, step in islice(zip(view.ops, plan.steps, strict=True), num_ops):
        result = op.apply(result, step)
    return result


def plan_views(
    views: Sequence[View], *, seed: int, epoch: int, index: int, height: int, width: int
) -> list[list[ViewPlan]]:
    """Draw the plans of all views of one image: one list of ``count`` plans for each kind of view.

    A plan is a function of (seed, epoch, index, number of the view) and the image's size alone.
    """
    result: list[list[ViewPlan]] = []
    number = 0
    for view in views:
        planned = []
        for _ in range(view.count):
            rng = borrow_view_stream(seed=seed, epoch=epoch, index=index, view=number)
            planned.append(plan_view(view, rng, height=height, width=width))
            number += 1
        result.append(planned)
    return result


def make_views(
    image: Image, views: Sequence[View], *, seed: int, epoch: int, index: int
) -> list[list[Image]]:
    """Make all views of one image: one list of ``count`` images for each kind of view."""
    height, width = image.shape[:2]
    plans = plan_views(views, seed=seed, epoch=epoch, index=index, height=height, width=width)
    return [
        [apply_view(view, image, plan) for plan in planned]
        for view, planned in zip(views, plans, strict=True)
    ]


def largest_shrink(
    views: Sequence[View], plans: Sequence[Sequence[ViewPlan]], allowed: Sequence[int]
) -> int:
    """Return the largest of the allowed factors to downscale an image by before cropping.

    Every crop must keep at least as many pixels as its view has, in both directions. Images with a
    border to add are not downscaled: the border's width in pixels would change.
    """
    factor = max(allowed)
    for view, planned in zip(views, plans, strict=True):
        if view.crop.pad is not None:
            return 1
        for plan in planned:
            room = min(plan.box.height, plan.box.width) // view.size_px
            if room < factor:
                factor = max((each for each in allowed if each <= room), default=1)
    return factor


def shrink_plan(plan: ViewPlan, factor: int, *, height: int, width: int) -> ViewPlan:
    """Convert a plan to the same image at 1/factor of its size, ``height`` x ``width`` pixels."""
    return ViewPlan(shrink_box(plan.box, factor, height=height, width=width), plan.steps)


def device_ops(view: View) -> tuple[DeviceOperation, ...]:
    """Return the longest suffix of a view's operations that the accelerator can run."""
    suffix: list[DeviceOperation] = []
    for op in reversed(view.ops):
        if not isinstance(op, DeviceOperation):
            break
        suffix.insert(0, op)
    return tuple(suffix)


def num_device_numbers(ops: Sequence[DeviceOperation]) -> int:
    """Return how many numbers :func:`device_numbers` returns."""
    return sum(1 + op.num_params for op in ops)


def device_numbers(
    ops: Sequence[DeviceOperation], plan: ViewPlan, *, size_px: int
) -> tuple[float, ...]:
    """Return the plans of a view's last operations as numbers, concatenated.

    Args:
        ops: The last operations of the view, from :func:`device_ops`.
        plan: The plan of the whole view.
        size_px: Side of the view in pixels.
    """
    steps = plan.steps[len(plan.steps) - len(ops) :]
    return tuple(
        value
        for op, step in zip(ops, steps, strict=True)
        for value in op.plan_numbers(step, size_px=size_px)
    )


def apply_device_ops(images: "Tensor", ops: Sequence[DeviceOperation], numbers: Floats) -> "Tensor":
    """Apply the last operations of a batch of views.

    Args:
        images: ``(N, 3, S, S)`` float32 on the device, whole levels in [0, 255]; not written to.
        ops: The operations, in order.
        numbers: ``(N, P)`` float32 on the CPU: :func:`device_numbers` of each view.

    Returns:
        ``(N, 3, S, S)`` float32, whole levels in [0, 255].
    """
    start = 0
    for op in ops:
        stop = start + 1 + op.num_params
        images = op.apply_batch(images, numbers[:, start:stop])
        start = stop
    return images


class Recipe(Config):
    """Settings that all recipes from papers have."""

    size_px: PositiveInt = 224
    """Side of the views in pixels; of the large ones, if there are several sizes."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of crops. bicubic keeps more fine detail, and is slower where it shrinks."""
    antialias: bool = True
    """Average over the pixels when a crop shrinks, as torchvision does; false is faster."""

    def crop(
        self,
        scale: tuple[float, float] = (0.08, 1.0),
        *,
        short_side: tuple[float, float] | None = None,
        pad: float | None = None,
    ) -> Crop:
        """Return a crop with the recipe's interpolation."""
        return Crop(
            scale=scale,
            short_side=short_side,
            pad=pad,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )
