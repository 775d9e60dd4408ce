"""Bicubic crops against Pillow's, which are torchvision's, and against Keys' formula."""

import cv2
import numpy as np
import pytest
from PIL import Image as PillowImage
from sklearn.datasets import load_sample_image

from raysl.augment.crop import CropBox, Image, apply_crop, plan_crop, resize

PHOTOS: dict[str, Image] = {
    name: load_sample_image(f"{name}.jpg").copy() for name in ("china", "flower")
}
every_photo = pytest.mark.parametrize("name", PHOTOS)


def small(name: str, size: tuple[int, int]) -> Image:
    return cv2.resize(PHOTOS[name], size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def cut(image: Image, box: CropBox) -> Image:
    return np.ascontiguousarray(
        image[box.top : box.top + box.height, box.left : box.left + box.width]
    )


def pillows(patch: Image, size_px: int, kernel: PillowImage.Resampling) -> Image:
    return np.asarray(PillowImage.fromarray(patch).resize((size_px, size_px), kernel))


def keys(patch: Image, size_px: int) -> np.ndarray:
    """Interpolate with Keys' kernel of a = -0.5, pixel by pixel as his equation (15) says.

    Half-pixel centres; weights beyond the image are left out and the others made to sum to one, as
    TensorFlow's ResizeBicubic has it.
    """
    result = patch.astype(float)
    for axis in (0, 1):
        length = patch.shape[axis]
        centres = (np.arange(size_px) + 0.5) * length / size_px - 0.5
        s = np.abs(centres[:, None] - np.arange(length)[None])
        near, far = 1.5 * s**3 - 2.5 * s**2 + 1, -0.5 * s**3 + 2.5 * s**2 - 4 * s + 2
        weights = np.where(s < 1, near, np.where(s < 2, far, 0.0))
        weights /= weights.sum(axis=1, keepdims=True)
        result = np.moveaxis(np.tensordot(weights, result, axes=(1, axis)), 0, axis)
    clipped: np.ndarray = np.clip(result, 0, 255)
    return clipped


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours.astype(float) - theirs.astype(float)).mean())


def fine_detail(image: np.ndarray) -> float:
    grey = np.asarray(image, dtype=float).mean(axis=2)
    return float(np.abs(cv2.Laplacian(grey, cv2.CV_64F)[1:-1, 1:-1]).mean())


class TestAveraging:
    @every_photo
    @pytest.mark.parametrize("size_px", [96, 224])
    def test_is_pillows_to_the_bit_where_a_side_shrinks(self, name: str, size_px: int) -> None:
        image, rng, shrunk = PHOTOS[name], np.random.default_rng(0), 0
        for _ in range(30):
            box = plan_crop(rng, height=427, width=640)
            if not size_px < max(box.height, box.width) <= 3 * size_px:
                continue
            shrunk += 1
            ours = apply_crop(image, box, size_px=size_px, interpolation="bicubic")
            theirs = pillows(cut(image, box), size_px, PillowImage.Resampling.BICUBIC)
            np.testing.assert_array_equal(ours, theirs)
        assert shrunk >= 10

    @every_photo
    def test_of_a_much_larger_image_is_pillows_to_half_a_level(self, name: str) -> None:
        ours = resize(PHOTOS[name], size_px=32, interpolation="bicubic")
        theirs = pillows(PHOTOS[name], 32, PillowImage.Resampling.BICUBIC)
        linear = pillows(PHOTOS[name], 32, PillowImage.Resampling.BILINEAR)
        assert apart(ours, theirs) < 0.5
        assert apart(ours, theirs) < 0.25 * apart(linear, theirs)

    @every_photo
    def test_keeps_the_detail_that_linear_crops_lose(self, name: str) -> None:
        image, rng = small(name, (500, 334)), np.random.default_rng(0)
        distance: dict[str, list[float]] = {"bicubic": [], "bilinear": []}
        detail: dict[str, list[float]] = {"bicubic": [], "bilinear": []}
        for _ in range(24):
            box = plan_crop(rng, height=334, width=500)
            theirs = pillows(cut(image, box), 224, PillowImage.Resampling.BICUBIC)
            for kind in ("bicubic", "bilinear"):
                ours = apply_crop(image, box, size_px=224, interpolation=kind)
                distance[kind].append(apart(ours, theirs))
                detail[kind].append(fine_detail(ours) / fine_detail(theirs))
        assert np.mean(distance["bicubic"]) < 0.25
        assert np.mean(distance["bilinear"]) > 0.6
        assert np.mean(detail["bicubic"]) == pytest.approx(1.0, abs=0.02)
        assert np.mean(detail["bilinear"]) < 0.87


class TestEnlarging:
    @every_photo
    @pytest.mark.parametrize(("size", "size_px"), [((32, 32), 32), ((300, 200), 224)])
    def test_is_near_pillows_and_keeps_its_detail(
        self, name: str, size: tuple[int, int], size_px: int
    ) -> None:
        image, rng = small(name, size), np.random.default_rng(0)
        ours_apart, linear_apart, detail = [], [], []
        for _ in range(60):
            box = plan_crop(rng, height=size[1], width=size[0])
            if max(box.height, box.width) >= size_px:
                continue
            theirs = pillows(cut(image, box), size_px, PillowImage.Resampling.BICUBIC)
            linear = pillows(cut(image, box), size_px, PillowImage.Resampling.BILINEAR)
            ours = apply_crop(image, box, size_px=size_px, interpolation="bicubic")
            ours_apart.append(apart(ours, theirs))
            linear_apart.append(apart(linear, theirs))
            detail.append(fine_detail(ours) / fine_detail(theirs))
        assert np.mean(ours_apart) < 0.7
        assert np.mean(ours_apart) < 0.5 * np.mean(linear_apart)
        assert np.mean(detail) == pytest.approx(1.0, abs=0.05)


class TestWithoutAveraging:
    @every_photo
    @pytest.mark.parametrize("size", [(32, 32), (500, 334)])
    def test_is_near_keys_formula_and_far_from_the_average(
        self, name: str, size: tuple[int, int]
    ) -> None:
        image, rng = small(name, size), np.random.default_rng(0)
        size_px = 32 if size[0] == 32 else 224
        ours_apart, linear_apart, averaged_apart = [], [], []
        for _ in range(20):
            box = plan_crop(rng, height=size[1], width=size[0])
            exact = keys(cut(image, box), size_px)
            made = [
                apply_crop(image, box, size_px=size_px, interpolation=kind, antialias=False)
                for kind in ("bicubic", "bilinear")
            ]
            ours_apart.append(apart(made[0], exact))
            linear_apart.append(apart(made[1], exact))
            theirs = pillows(cut(image, box), size_px, PillowImage.Resampling.BICUBIC)
            averaged_apart.append(apart(theirs, exact))
        assert np.mean(ours_apart) < 0.7
        assert np.mean(ours_apart) < 0.55 * np.mean(linear_apart)
        if size_px == 224:  # the large ones shrink
            assert np.mean(ours_apart) < 0.8 * np.mean(averaged_apart)


class TestResize:
    @pytest.mark.parametrize("antialias", [True, False])
    @pytest.mark.parametrize("size_px", [1, 7, 37, 64])
    def test_keeps_a_flat_image_flat(self, size_px: int, antialias: bool) -> None:
        flat = np.full((37, 53, 3), (10, 200, 77), dtype=np.uint8)
        found = resize(flat, size_px=size_px, interpolation="bicubic", antialias=antialias)
        np.testing.assert_array_equal(found, np.broadcast_to(flat[0, 0], (size_px, size_px, 3)))

    def test_of_the_same_size_is_the_image(self) -> None:
        image = small("china", (40, 40))
        assert resize(image, size_px=40, interpolation="bicubic") is image
