"""What the accelerator does to a batch is what the data workers would have done to each image."""

from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from raysl.augment.base import DeviceOperation
from raysl.augment.ops import (
    Blur,
    ColorJitter,
    CropPart,
    Cutout,
    Flip,
    Grey,
    Noise,
    Op,
    Sobel,
    Solarise,
)
from raysl.augment.pipeline import View, device_ops
from raysl.augment.recipes import BYOLViews, SimCLRViews
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec, ItemMaker
from raysl.sources.source import ArraySource
from raysl.train.batches import view_converter

SIDE = 64
ADDED = ColorJitter(
    brightness=0.4, brightness_kind="add", contrast=0, saturation=0, hue=0, prob=0.8
)

OPS = [
    (CropPart(prob=0.8), 0.15, 1),
    (CropPart(scale=(0.01, 0.1), ratio=(0.2, 5.0)), 0.15, 1),
    (Flip(prob=0.5), 0.0, 0),
    (ColorJitter(brightness=0.8, contrast=0, saturation=0, hue=0, prob=1), 0.001, 1),
    (ADDED, 0.001, 1),
    (ColorJitter(brightness=0, contrast=0.8, saturation=0, hue=0, prob=1), 0.001, 1),
    (ColorJitter(brightness=0, contrast=0, saturation=0.8, hue=0, prob=1), 0.05, 1),
    (ColorJitter(brightness=0, contrast=0, saturation=0, hue=0.5, prob=1), 0.3, 8),
    (ColorJitter(prob=0.8), 0.3, 25),
    (Grey(prob=0.5), 0.001, 1),
    (Blur(prob=0.7), 0.001, 1),
    (Blur(sigma_px=(1, 5), kernel_fraction=None, prob=0.9), 0.001, 1),
    (Solarise(threshold=100, prob=0.5), 0.0, 0),
    (Sobel(prob=0.5), 0.01, 1),
    (Cutout(side=(0.1, 0.9), prob=0.8), 0.0, 0),
]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    photos = [
        cv2.resize(p, (160, 120), interpolation=cv2.INTER_AREA) for p in load_sample_images().images
    ]
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 120 - SIDE, (12, 2))
    cut = [photos[n % 2][y : y + SIDE, x : x + SIDE] for n, (y, x) in enumerate(corners)]
    noise = rng.integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    return np.stack([*cut, *noise])


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize(("op", "mean", "most"), OPS, ids=lambda v: getattr(v, "op", None))
def test_an_op_gives_what_the_cpu_gives(
    images: np.ndarray, op: DeviceOperation, mean: float, most: int
) -> None:
    rng = np.random.default_rng(1)
    plans = [op.plan(rng) for _ in images]
    expected = np.stack([op.apply(image, plan) for image, plan in zip(images, plans, strict=True)])
    numbers = np.array([op.plan_numbers(plan, size_px=SIDE) for plan in plans], dtype=np.float32)
    before = _tensor(images)
    result = op.apply_batch(before, numbers)
    assert torch.equal(before, _tensor(images))  # not written to
    apart = (result - _tensor(expected)).abs()
    assert apart.mean() <= mean
    assert apart.max() <= most
    assert torch.equal(result, result.round())


def test_every_op_of_the_device_is_tested() -> None:
    kinds = set(get_args(get_args(Op)[0]))
    assert {kind for kind in kinds if issubclass(kind, DeviceOperation)} == {
        type(op) for op, *_ in OPS
    }, "give a new operation a line in OPS"


def test_only_the_last_ops_go_to_the_device() -> None:
    view = View(ops=(Flip(), Noise(), Grey(), Blur()))
    assert device_ops(view) == (Grey(), Blur())
    assert device_ops(View(ops=(Grey(), Noise()))) == ()
    assert device_ops(View(ops=(Grey(), Blur()))) == (Grey(), Blur())


@pytest.mark.parametrize("recipe", [SimCLRViews, BYOLViews])
def test_a_whole_batch_has_the_views_of_the_cpu(images: np.ndarray, recipe: Any) -> None:
    """From the data worker to the method's input, both ways."""
    views = recipe(size_px=48).views()
    source = ArraySource("photos", images)
    plan = Plan([len(images)], seed=0, global_batch_size=14, item_size=14, num_steps=1)
    made = [
        view_converter(
            device=torch.device("cpu"),
            mean=(0.0, 0.0, 0.0),
            std=(1 / 255,) * 3,
            channels_last=True,
            device_ops=[device_ops(view) for view in views],
        )(ItemMaker(source, plan, BlockSpec(views, color_on=where))(0))
        for where in ("cpu", "device")
    ]
    assert [tuple(view.shape) for view in made[1]] == [(14, 3, 48, 48)] * 2
    for cpu, device in zip(*made, strict=True):
        assert device.is_contiguous(memory_format=torch.channels_last)
        apart = (cpu - device).abs()
        assert apart.mean() < 0.3
        assert apart.quantile(0.99) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("op", "mean", "most"), OPS, ids=lambda v: getattr(v, "op", None))
def test_a_gpu_gives_what_the_cpu_gives(
    images: np.ndarray, op: DeviceOperation, mean: float, most: int
) -> None:
    rng = np.random.default_rng(1)
    plans = [op.plan(rng) for _ in images]
    numbers = np.array([op.plan_numbers(plan, size_px=SIDE) for plan in plans], dtype=np.float32)
    there = op.apply_batch(_tensor(images).cuda(), numbers).cpu()
    here = op.apply_batch(_tensor(images), numbers)
    assert (there - here).abs().max() <= 1 + most
    assert (there - here).abs().mean() <= 0.01 + mean
