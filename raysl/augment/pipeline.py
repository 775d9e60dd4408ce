"""A view as a YAML composes it: a crop, then operations in order; planned first, then applied."""

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
    """Random crop, resized to the view's side: of random area and aspect, or a square."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle(("scale", "ratio"), {"short_side": (GIVEN,)}),)
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Range of the box's area over the image's."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Range of width over height."""
    short_side: tuple[Fraction, Fraction] | None = None
    """Cut a square instead: range of its side over the image's shorter one."""
    pad: Fraction | None = None
    """Add a border to the image before the square is cut: its width over the image's shorter side
    (0.125: 4 px on each side of CIFAR-10's 32). It goes with short_side."""
    border: Border = "black"
    """The added border: black, or the image's mirror image (reflect)."""
    interpolation: Interpolation = "bilinear"
    """How the crop is resized. bicubic keeps more of what is fine; where it shrinks, it is Pillow's
    own and takes three times as long."""
    antialias: bool = True
    """Average over the pixels when the crop shrinks; false interpolates, which is quicker."""

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
        """Cut out the planned box and resize it to a square."""
        return apply_crop(
            image,
            box,
            size_px=size_px,
            interpolation=self.interpolation,
            antialias=self.antialias,
            border=self.border,
        )


class View(Config):
    """One kind of view; ``count`` of them are drawn independently from each image."""

    count: Annotated[int, Field(gt=0, le=MAX_VIEWS)] = 1
    size_px: PositiveInt = 224
    """Side of the view in pixels."""
    crop: Crop = Crop()
    ops: tuple[Op, ...] = ()


class ViewPlan(NamedTuple):
    """All that is random about one view; pixels follow from it and the image alone."""

    box: CropBox
    steps: tuple[Any, ...]  # one entry an op of the view


def plan_view(view: View, rng: np.random.Generator, *, height: int, width: int) -> ViewPlan:
    """Draw a view of an image of ``height`` x ``width`` pixels from its own stream."""
    box = view.crop.plan(rng, height=height, width=width)
    return ViewPlan(box, tuple(op.plan(rng) for op in view.ops))


def apply_view(view: View, image: Image, plan: ViewPlan, *, num_ops: int | None = None) -> Image:
    """Make the planned view.

    Args:
        view: The kind of view the plan was drawn for.
        image: ``(H, W, 3)`` uint8 RGB.
        plan: What :func:`plan_view` drew.
        num_ops: Stop after so many operations; None for all.

    Returns:
        ``(size_px, size_px, 3)`` uint8; may share memory with ``image`` if nothing had to change.
    """
    result = view.crop.apply(image, plan.box, size_px=view.size_px)
    for op, step in islice(zip(view.ops, plan.steps, strict=True), num_ops):
        result = op.apply(result, step)
    return result


def plan_views(
    views: Sequence[View], *, seed: int, epoch: int, index: int, height: int, width: int
) -> list[list[ViewPlan]]:
    """Draw all views of one image: a list a kind of view, with ``count`` entries each.

    A view is a function of (seed, epoch, index, number of the view) and the image's size alone.
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
    """Make all views of one image: a list a kind of view, with ``count`` entries each."""
    height, width = image.shape[:2]
    plans = plan_views(views, seed=seed, epoch=epoch, index=index, height=height, width=width)
    return [
        [apply_view(view, image, plan) for plan in planned]
        for view, planned in zip(views, plans, strict=True)
    ]


def largest_shrink(
    views: Sequence[View], plans: Sequence[Sequence[ViewPlan]], allowed: Sequence[int]
) -> int:
    """Return the largest of the allowed factors by which the image may be shrunk beforehand.

    Every crop must keep at least as many pixels as its view has, in both directions. A border that
    is to be added keeps the image as it is: at another size it would be another border.
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
    """Return a plan for the same image at 1/factor of its size, ``height`` x ``width`` pixels."""
    return ViewPlan(shrink_box(plan.box, factor, height=height, width=width), plan.steps)


def device_ops(view: View) -> tuple[Op, ...]:
    """Return the last operations of a view, as many as the accelerator can do.

    An operation can run there if it has ``numbers``.
    """
    return tuple(takewhile(lambda op: hasattr(op, "numbers"), reversed(view.ops)))[::-1]


def device_numbers(ops: Sequence[Op], plan: ViewPlan, *, size_px: int) -> Numbers:
    """Return the plans of a view's last ops as numbers, in the order of the ops.

    Args:
        ops: The last ops of the view, as :func:`device_ops` returns them.
        plan: The plan of the whole view.
        size_px: Side of the view.
    """
    steps = plan.steps[len(plan.steps) - len(ops) :]
    return tuple(
        value
        for op, step in zip(ops, steps, strict=True)
        for value in op.numbers(step, size_px=size_px)  # type: ignore[union-attr]
    )
