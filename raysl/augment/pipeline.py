"""Define a view as a crop and a sequence of operations; plan it, then apply it."""

from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from raysl.augment.crop import (
    Border,
    CropBox,
    Image,
    Interpolation,
    apply_crop,
    plan_crop,
    plan_padded,
    plan_square,
    shrink_box,
)
from raysl.augment.ops import Fraction, Numbers, Op, check_range
from raysl.augment.random import MAX_VIEWS, borrow_view_stream
from raysl.config.base import GIVEN, Config, Idle, PositiveFloat, PositiveInt


class Crop(Config):
    """Random crop, resized to the view's side: of random area and aspect ratio, or a square."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("scale", "ratio"), {"short_side": (GIVEN,)}),)
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Range of the crop's area over the image's."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Range of width over height."""
    short_side: tuple[Fraction, Fraction] | None = None
    """Crop a square instead: range of its side over the image's short side."""
    pad: Fraction | None = None
    """Add a border to the image before cropping the square: its width over the image's short side
    (0.125: 4 px on each side of CIFAR-10's 32). Requires short_side."""
    border: Border = "black"
    """The border: black, or the image's mirror image (reflect)."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of the resize. bicubic keeps more fine detail; for shrinking it uses Pillow and
    takes three times as long."""
    antialias: bool = True
    """Average over the pixels when the crop shrinks; false interpolates, which is faster."""

    @model_validator(mode="after")
    def _ordered(self) -> "Crop":
        check_range("scale", self.scale)
        check_range("ratio", self.ratio)
        if self.short_side is not None:
            check_range("short_side", self.short_side)
        return self

    @model_validator(mode="after")
    def _border_is_there(self) -> "Crop":
        if self.pad is not None and self.short_side is None:
            raise ValueError(
                f"pad={self.pad:g} is for squares: give short_side too, [1, 1] for one of the "
                f"image's shorter side"
            )
        if self.border != "black" and self.pad is None:
            raise ValueError(f"border={self.border} needs pad, the width of the border")
        return self

    def plan(self, rng: np.random.Generator, *, height: int, width: int) -> CropBox:
        """Draw a box inside an image, or with ``pad`` inside the image and its border."""
        if self.short_side is None:
            return plan_crop(rng, height=height, width=width, scale=self.scale, ratio=self.ratio)
        if self.pad is None:
            return plan_square(rng, height=height, width=width, short_side=self.short_side)
        return plan_padded(
            rng, height=height, width=width, short_side=self.short_side, pad=self.pad
        )

    def apply(self, image: Image, box: CropBox, *, size_px: int) -> Image:
        """Crop the planned box and resize it to a square."""
        return apply_crop(
            image,
            box,
            size_px=size_px,
            interpolation=self.interpolation,
            antialias=self.antialias,
            border=self.border,
        )


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


def device_ops(view: View) -> tuple[Op, ...]:
    """Return the longest suffix of a view's operations that the accelerator can run.

    An operation can run there if it has a method ``numbers``.
    """
    return tuple(takewhile(lambda op: hasattr(op, "numbers"), reversed(view.ops)))[::-1]


def device_numbers(ops: Sequence[Op], plan: ViewPlan, *, size_px: int) -> Numbers:
    """Return the plans of a view's last operations as numbers, concatenated.

    Args:
        ops: The last operations of the view, from :func:`device_ops`.
        plan: The plan of the whole view.
        size_px: Side of the view.
    """
    steps = plan.steps[len(plan.steps) - len(ops) :]
    return tuple(
        value
        for op, step in zip(ops, steps, strict=True)
        for value in op.numbers(step, size_px=size_px)  # type: ignore[union-attr]
    )
