from itertools import product
from typing import get_args

import numpy as np
import pytest

from raysl.augment.crop import Image
from raysl.augment.ops import CropPart, Sobel
from raysl.augment.pairs import Augmentation, PairViews
from raysl.augment.pipeline import make_views

NAMES: tuple[Augmentation, ...] = get_args(Augmentation)


@pytest.fixture
def image() -> Image:
    image: Image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return image


def test_there_are_the_seven_of_figure_5() -> None:
    assert NAMES == ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate")


@pytest.mark.parametrize(("first", "second"), list(product(NAMES, NAMES)))
def test_one_view_is_transformed_and_the_other_is_the_image(
    first: Augmentation, second: Augmentation, image: Image
) -> None:
    views = PairViews(size_px=32, first=first, second=second).views()
    changed = 0
    for index in range(10):
        (one,), (other,) = make_views(image, views, seed=0, epoch=0, index=index)
        np.testing.assert_array_equal(other, image)
        changed += (one != image).any()
    assert changed >= 8  # colour distortion and crops of the whole leave some as they are


def test_they_act_in_the_order_given() -> None:
    def ops(first: Augmentation, second: Augmentation) -> list[type]:
        return [type(op) for op in PairViews(first=first, second=second).views()[0].ops]

    there, back = ops("crop", "sobel"), ops("sobel", "crop")
    assert (there[0], there[-1]) == (CropPart, Sobel)
    assert (back[0], back[1]) == (Sobel, CropPart)


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_same_one_acts_once(name: Augmentation) -> None:
    single = PairViews(first=name, second=name).views()[0].ops
    other: Augmentation = "blur" if name != "blur" else "noise"
    pair = PairViews(first=name, second=other).views()[0].ops
    assert pair[: len(single)] == single
    assert len(pair) == len(single) + 1


def test_edges_alone_are_the_edges_of_the_image(image: Image) -> None:
    views = PairViews(size_px=32, first="sobel", second="sobel").views()
    (one,), _ = make_views(image, views, seed=0, epoch=0, index=0)
    np.testing.assert_array_equal(one, Sobel().apply(image, True))
