"""Each operation against torchvision's definition of it: the pixels, and what is drawn.

Tolerances are in levels of 0 to 255, a little above what was measured. Most of each is
torchvision's own: on uint8 it cuts fractions off after every step, we round.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from raysl.augment.crop import CropBox, Image, apply_crop, plan_crop
from raysl.augment.filters import NoisePlan
from raysl.augment.geometric import PLANNED_SIDE_PX
from raysl.augment.ops import (
    Blur,
    ColorJitter,
    CropPart,
    Cutout,
    Flip,
    Grey,
    Noise,
    Op,
    QuarterTurn,
    Rotate,
    Sobel,
    Solarise,
)
from raysl.augment.photometric import JitterPlan
from raysl.augment.pipeline import apply_view, plan_view
from raysl.augment.random import borrow_view_stream
from raysl.augment.recipes import SimCLRViews

SIDE = 224
DRAWS = 4000
IN_ORDER, CUBIC = (0, 1, 2, 3), InterpolationMode.BICUBIC
FACTORS = ("brightness", "contrast", "saturation")


def photo(name: str) -> Image:
    """Return a photograph of 427 x 640 pixels."""
    image: Image = load_sample_image(f"{name}.jpg").copy()
    return image


def noise(height: int, width: int) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cube() -> Image:
    """Make an image of 32,768 colours spread evenly over the RGB cube."""
    levels = np.linspace(0, 255, 32).round().astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(128, 256, 3)


WHOLE = {"china": photo("china"), "flower": photo("flower"), "noise": noise(427, 640)}
SQUARE = {
    "china": WHOLE["china"][100 : 100 + SIDE, 200 : 200 + SIDE].copy(),
    "flower": WHOLE["flower"][60 : 60 + SIDE, 180 : 180 + SIDE].copy(),
    "noise": noise(SIDE, SIDE),
}

every_whole = pytest.mark.parametrize("image", WHOLE.values(), ids=WHOLE)
every_square = pytest.mark.parametrize("image", SQUARE.values(), ids=SQUARE)


def tensor(image: Image) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def array(pixels: torch.Tensor) -> np.ndarray:
    found: np.ndarray = pixels.permute(1, 2, 0).numpy()
    return found


def levels_apart(ours: Image, theirs: torch.Tensor) -> np.ndarray:
    return ours.astype(np.float64) - array(theirs)


def torchvisions(op: Any, plan: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Apply what torchvision calls this operation, with the parameters that we drew."""
    side = pixels.shape[-1]
    if isinstance(op, ColorJitter):
        steps: list[tuple[Callable[..., torch.Tensor], float]] = [
            (tv.adjust_brightness, plan.brightness),
            (tv.adjust_contrast, plan.contrast),
            (tv.adjust_saturation, plan.saturation),
            (tv.adjust_hue, plan.hue),
        ]
        for number in plan.order:
            step, factor = steps[number]
            pixels = step(pixels, factor)
        return pixels
    if isinstance(op, Blur):
        cut = None if op.kernel_fraction is None else int(side * op.kernel_fraction) | 1
        kernel = [cut or 31] * 2
        return tv.gaussian_blur(pixels, kernel, [plan, plan])
    if isinstance(op, Rotate):
        return tv.rotate(pixels, plan, InterpolationMode.BILINEAR)
    if isinstance(op, CropPart):
        return tv.resized_crop(pixels, *op.scaled(plan, side), [side, side], antialias=True)
    if isinstance(op, Solarise):
        return tv.solarize(pixels, op.threshold)
    simple: dict[type, Callable[[torch.Tensor], torch.Tensor]] = {
        Flip: tv.horizontal_flip,
        Grey: lambda x: tv.rgb_to_grayscale(x, 3),
        QuarterTurn: lambda x: tv.rotate(x, 90 * plan),
    }
    return simple[type(op)](pixels)


class Case(NamedTuple):
    op: Any
    plan: Any
    most: float  # levels, of any channel of any pixel
    mean: float  # levels, over the image

    @property
    def name(self) -> str:
        drawn = [f"{v:.4g}" for v in self.plan[:4]] if isinstance(self.plan, tuple) else [self.plan]
        return " ".join(map(str, [self.op.op, *drawn]))


def jitter(**factor: float) -> JitterPlan:
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    return JitterPlan(**{**neutral, **factor}, order=IN_ORDER)


def part(top: int, left: int, height: int, width: int) -> CropBox:
    return CropBox(*(PLANNED_SIDE_PX // 4 * quarters for quarters in (top, left, height, width)))


CASES = [
    Case(Flip(), True, 0, 0),
    Case(Solarise(threshold=100), True, 0, 0),
    Case(Solarise(threshold=0), True, 0, 0),
    Case(Solarise(threshold=255), True, 0, 0),
    *(Case(QuarterTurn(), turns, 0, 0) for turns in (1, 2, 3)),
    *(Case(CropPart(), part(*box), 1, 0.3) for box in ((1, 2, 3, 1), (0, 3, 1, 1))),
    Case(Grey(), True, 1, 0.55),
    *(Case(ColorJitter(), jitter(**{f: 1.0}), 0, 0) for f in FACTORS),
    *(Case(ColorJitter(), jitter(brightness=b), 1, 0.45) for b in (0.0, 0.2, 0.6, 1.4, 1.8)),
    Case(ColorJitter(), jitter(contrast=0.0), 2, 1),  # a flat image: its level cut off
    *(Case(ColorJitter(), jitter(contrast=c), 2, 0.7) for c in (0.2, 0.6, 0.9)),
    *(Case(ColorJitter(), jitter(contrast=c), 1, 0.35) for c in (1.4, 1.8)),
    *(Case(ColorJitter(), jitter(saturation=s), 2, 0.9) for s in (0.0, 0.2)),
    *(Case(ColorJitter(), jitter(saturation=s), 1, 0.65) for s in (0.6, 0.9)),
    *(Case(ColorJitter(), jitter(saturation=s), 1, 0.4) for s in (1.4, 1.8)),
    # 8-bit hue: half a step each way, and a step moves a channel by up to 6 levels.
    *(Case(ColorJitter(), jitter(hue=h), 7, 0.45) for h in (-0.5, -0.37, -0.2, 0.02, 0.1, 1 / 3)),
    *(Case(Blur(kernel_fraction=None), sigma, 1, 0.03) for sigma in (0.1, 0.5, 1.0, 2.0)),
    *(Case(Blur(kernel_fraction=f), 2.0, 1, 0.03) for f in (0.1, 0.04, 0.02)),
    # Only where torchvision had pixels to turn: beyond, it is black and we repeat the border.
    *(Case(Rotate(), angle, 1, 0.01) for angle in (-40.0, -15.0, 3.0, 10.0, 90.0)),
]
WITHOUT_A_TORCHVISION = {Noise, Sobel, Cutout}


class TestPixels:
    def test_every_operation_is_compared_here(self) -> None:
        (union, _) = get_args(Op)
        assert {type(case.op) for case in CASES} | WITHOUT_A_TORCHVISION == set(get_args(union))

    @every_square
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_are_within_tolerance_of_torchvisions(self, case: Case, image: Image) -> None:
        apart = np.abs(
            levels_apart(
                case.op.apply(image, case.plan), torchvisions(case.op, case.plan, tensor(image))
            )
        )
        if isinstance(case.op, Rotate):
            white = torch.full((3, SIDE, SIDE), 255.0)
            apart = apart[array(torchvisions(case.op, case.plan, white)) > 254.99]
        assert apart.max() <= case.most
        assert apart.mean() <= case.mean

    @pytest.mark.parametrize(
        "case", [c for c in CASES if isinstance(c.op, ColorJitter | Grey)], ids=lambda c: c.name
    )
    def test_of_every_colour_are_as_near(self, case: Case) -> None:
        ours = case.op.apply(cube(), case.plan)
        apart = np.abs(levels_apart(ours, torchvisions(case.op, case.plan, tensor(cube()))))
        assert apart.max() <= case.most

    @every_square
    def test_of_a_whole_jitter_are_nearer_to_the_definition_than_torchvisions_uint8(
        self, image: Image
    ) -> None:
        op, rng = ColorJitter(prob=1.0), np.random.default_rng(0)
        found = []
        for _ in range(20):
            plan = op.plan(rng)
            ours = op.apply(image, plan)
            theirs = torchvisions(op, plan, tensor(image))
            exact = 255 * torchvisions(op, plan, tensor(image) / 255)
            found.append(
                (
                    np.abs(levels_apart(ours, theirs)).max(),
                    np.abs(levels_apart(ours, theirs)).mean(),
                    np.abs(levels_apart(ours, exact)).mean(),
                    np.abs(array(exact) - array(theirs)).mean(),
                    levels_apart(ours, exact).mean(),
                )
            )
        to_uint8, to_uint8_mean, to_exact, uint8_to_exact, bias = np.array(found).T
        assert to_uint8.max() <= 15
        assert to_uint8_mean.max() <= 2.5
        assert to_exact.max() <= 0.9
        assert to_exact.mean() < 0.5 * uint8_to_exact.mean()
        assert abs(bias.mean()) < 0.1

    def test_of_a_turned_hue_do_not_drift_to_one_side(self) -> None:
        # OpenCV's hue has 256 levels a turn on the way there and 255 on the way back.
        turn = np.linspace(0, 6, 1536, endpoint=False)
        pure = 255 * np.clip(2 - np.abs((turn[:, None] - (2, 4, 6) + 1) % 6 - 3), 0, 1)
        image = pure.round().astype(np.uint8)[None]
        for shift in (-0.3, 0.15, 0.4):
            turned = ColorJitter().apply(image, jitter(hue=shift))[0].astype(float)
            expected = array(tv.adjust_hue(tensor(image), shift))[0]
            complex_hue = np.exp(2j * np.pi * np.arange(3) / 3)
            drift = np.angle((turned @ complex_hue) / (expected @ complex_hue), deg=True)
            assert abs(drift.mean()) < 0.1
            assert np.abs(drift).max() < 2.1  # a step is 1.4 degrees

    @every_whole
    def test_of_a_whole_simclr_view_are_those_of_torchvisions_chain(self, image: Image) -> None:
        view = SimCLRViews(size_px=SIDE).views()[0]
        means, likeness = [], []
        for index in range(12):
            rng = borrow_view_stream(seed=0, epoch=0, index=index, view=0)
            plan = plan_view(view, rng, height=image.shape[0], width=image.shape[1])
            theirs = tv.resized_crop(tensor(image), *plan.box, [SIDE, SIDE], CUBIC)
            for op, step in zip(view.ops, plan.steps, strict=True):
                if step is not None and step is not False:
                    theirs = torchvisions(op, step, theirs)
            ours = apply_view(view, image, plan)
            means.append(np.abs(levels_apart(ours, theirs)).mean())
            likeness.append(np.corrcoef(ours.ravel(), array(theirs).ravel())[0, 1])
        photograph = image is not WHOLE["noise"]
        assert max(means) <= (3.0 if photograph else 6.0)
        assert min(likeness) >= (0.998 if photograph else 0.93)


class TestCropsPixels:
    @pytest.mark.parametrize(
        ("box", "size_px", "most", "mean"),
        [
            # Enlarging: both interpolate linearly, torchvision in fixed point.
            (CropBox(3, 5, 30, 30), 96, 1, 0.3),
            (CropBox(16, 8, 60, 40), 96, 1, 0.3),
            # Shrinking: area average here, a triangle over twice the area there.
            (CropBox(3, 5, 110, 90), 64, 4, 0.5),
            (CropBox(0, 0, 128, 128), 32, 9, 1.5),
            (CropBox(0, 0, 128, 128), 90, 3, 0.5),  # by less than two
            # One side shrinks, the other grows: each as it should.
            (CropBox(0, 0, 128, 90), 100, 3, 0.5),
            (CropBox(0, 0, 120, 30), 48, 9, 1.0),
        ],
    )
    def test_are_near_torchvisions_antialiased_resize_on_a_smooth_image(
        self, box: CropBox, size_px: int, most: int, mean: float
    ) -> None:
        blobs = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = cv2.resize(blobs, (128, 128), interpolation=cv2.INTER_CUBIC)
        theirs = tv.resized_crop(tensor(image), *box, [size_px, size_px], antialias=True)
        apart = np.abs(levels_apart(apply_crop(image, box, size_px=size_px), theirs))
        assert apart.max() <= most
        assert apart.mean() <= mean

    @pytest.mark.parametrize(
        ("name", "size_px", "most", "mean", "share"),
        [
            ("china", 32, 50, 3.0, 0.25),
            ("china", 96, 50, 2.4, 0.33),
            ("china", 224, 45, 1.1, 0.45),
            ("flower", 32, 35, 2.2, 0.3),
            ("flower", 96, 35, 1.2, 0.4),
            ("flower", 224, 35, 0.5, 0.6),
            ("noise", 32, 35, 4.0, 0.12),
            ("noise", 96, 70, 7.5, 0.25),
            ("noise", 224, 80, 4.5, 0.36),
        ],
    )
    def test_of_random_boxes_are_near_torchvisions_and_far_from_those_that_alias(
        self, name: str, size_px: int, most: float, mean: float, share: float
    ) -> None:
        image, rng = WHOLE[name], np.random.default_rng(0)
        ours_apart, aliased_apart, largest, bias = [], [], 0.0, []
        for _ in range(16):
            box = plan_crop(rng, height=427, width=640)
            ours = apply_crop(image, box, size_px=size_px)
            theirs, aliased = (
                tv.resized_crop(tensor(image), *box, [size_px, size_px], antialias=antialias)
                for antialias in (True, False)
            )
            apart = levels_apart(ours, theirs)
            largest = max(largest, np.abs(apart).max())
            ours_apart.append(np.abs(apart).mean())
            bias.append(apart.mean())
            aliased_apart.append(np.abs(array(aliased).astype(float) - array(theirs)).mean())
        assert largest <= most
        assert np.mean(ours_apart) <= mean
        assert np.mean(ours_apart) <= share * np.mean(aliased_apart)
        assert np.abs(bias).max() <= 0.3  # no shift of brightness

    @pytest.mark.parametrize("size_px", [32, 96, 224])
    @every_whole
    def test_without_antialiasing_are_torchvisions_to_a_level(
        self, image: Image, size_px: int
    ) -> None:
        rng = np.random.default_rng(0)
        for _ in range(6):
            box = plan_crop(rng, height=427, width=640)
            ours = apply_crop(image, box, size_px=size_px, antialias=False)
            theirs = tv.resized_crop(tensor(image), *box, [size_px, size_px], antialias=False)
            apart = np.abs(levels_apart(ours, theirs))
            assert apart.max() <= 1
            assert apart.mean() <= 0.4


class TestNoise:
    def test_is_gaussian_of_the_deviation_asked_for(self) -> None:
        grey = np.full((128, 128, 3), 128, dtype=np.uint8)
        apart = Noise().apply(grey, NoisePlan(sigma=0.05, seed=3)).astype(float) - 128
        count, sigma = apart.size, 0.05 * 255
        assert abs(apart.mean()) < 4 * sigma / math.sqrt(count)
        # Rounding to whole levels adds a twelfth to the variance.
        assert apart.var() == pytest.approx(sigma**2 + 1 / 12, rel=4 * math.sqrt(2 / count))
        assert abs(stats.skew(apart.ravel())) < 4 * math.sqrt(6 / count)
        assert abs(stats.kurtosis(apart.ravel())) < 4 * math.sqrt(24 / count)
        spread = apart + np.random.default_rng(0).uniform(-0.5, 0.5, apart.shape)
        whole = math.hypot(sigma, math.sqrt(1 / 12))
        assert stats.kstest(spread.ravel(), stats.norm(0, whole).cdf).pvalue > 1e-3

    def test_has_the_distribution_of_torchvisions_in_float(self) -> None:
        # On uint8 torchvision cuts the noise off towards zero, which makes it weaker.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for level in (10, 128, 250):  # near the ends both clamp
                image = np.full((64, 64, 3), level, dtype=np.uint8)
                ours = Noise().apply(image, NoisePlan(sigma=0.1, seed=level))
                theirs = tv.gaussian_noise(tensor(image) / 255, sigma=0.1)
                rounded = (theirs * 255).round().flatten().numpy()
                assert stats.ks_2samp(ours.ravel(), rounded).pvalue > 1e-3

    def test_is_independent_from_pixel_to_pixel_and_channel_to_channel(self) -> None:
        grey = np.full((128, 128, 3), 128, dtype=np.uint8)
        apart = Noise().apply(grey, NoisePlan(sigma=0.1, seed=5)).astype(float) - 128
        for one, other in (
            (apart[1:], apart[:-1]),
            (apart[:, 1:], apart[:, :-1]),
            (apart[..., 1:], apart[..., :-1]),
        ):
            likeness = np.corrcoef(one.ravel(), other.ravel())[0, 1]
            assert abs(likeness) < 4 / math.sqrt(one.size)


class TestSobel:
    @every_square
    def test_is_scipys_gradient_of_the_luma(self, image: Image) -> None:
        luma = np.rint(image.astype(float) @ (0.299, 0.587, 0.114))
        down, across = (ndimage.sobel(luma, axis, mode="nearest") for axis in (0, 1))
        expected = np.minimum(np.hypot(across, down) / 4, 255)
        apart = np.abs(Sobel().apply(image, True) - expected[..., None])
        assert apart.max() <= 1.0  # half a level, and a luma that is rounded the other way
        assert apart.mean() <= 0.26


def assert_same_distribution(ours: Any, theirs: Any, what: str) -> None:
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3, what
    for power in (1, 2):
        one, other = ours**power, theirs**power
        # The difference of two means: four standard errors, one time in 16,000.
        error = math.sqrt(one.var() / len(one) + other.var() / len(other))
        assert one.mean() == pytest.approx(other.mean(), abs=4 * error), f"{what}, moment {power}"


def torchvisions_draws(transform: Any, pixels: torch.Tensor) -> list[dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [transform.make_params([pixels]) for _ in range(DRAWS)]


class TestDraws:
    @pytest.mark.parametrize(
        ("size", "scale", "ratio"),
        [
            ((96, 96), (0.08, 1.0), (3 / 4, 4 / 3)),
            ((375, 500), (0.2, 1.0), (3 / 4, 4 / 3)),
            ((60, 200), (0.08, 1.0), (3 / 4, 4 / 3)),  # every third one falls back
            ((200, 120), (0.05, 0.3), (1 / 2, 2.0)),
        ],
    )
    def test_of_boxes_are_those_of_random_resized_crop(
        self, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
    ) -> None:
        rng = np.random.default_rng(0)
        ours = np.array(
            [
                plan_crop(rng, height=size[0], width=size[1], scale=scale, ratio=ratio)
                for _ in range(DRAWS)
            ]
        )
        pixels = torch.empty(3, *size, dtype=torch.uint8)
        drawn = torchvisions_draws(v2.RandomResizedCrop(8, scale=scale, ratio=ratio), pixels)
        theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
        for name, of in {
            "area": lambda top, left, height, width: height * width,
            "log aspect": lambda top, left, height, width: np.log(width / height),
            "centre y": lambda top, left, height, width: top + height / 2,
            "centre x": lambda top, left, height, width: left + width / 2,
            "bottom": lambda top, left, height, width: top + height,
        }.items():
            assert_same_distribution(of(*ours.T), of(*theirs.T), name)

    @pytest.mark.parametrize("strength", [0.0, 0.4, 0.8, 1.5])  # beyond 1 the factor stops at 0
    def test_of_a_jitter_are_those_of_color_jitter(self, strength: float) -> None:
        hue = min(0.25 * strength, 0.5)
        given = {"brightness": strength, "contrast": strength, "saturation": strength, "hue": hue}
        rng, op = np.random.default_rng(0), ColorJitter(**given, prob=1.0)
        ours = [plan for plan in (op.plan(rng) for _ in range(DRAWS)) if plan is not None]
        transform = v2.ColorJitter(**given)
        theirs = torchvisions_draws(transform, torch.empty(3, 1, 1))
        for name, neutral in {**dict.fromkeys(FACTORS, 1.0), "hue": 0.0}.items():
            mine = [getattr(plan, name) for plan in ours]
            other = [drawn[f"{name}_factor"] for drawn in theirs]
            low, high = getattr(transform, name) or (neutral, neutral)
            assert low <= min(mine) <= max(mine) <= high
            assert_same_distribution(mine, [neutral if x is None else x for x in other], name)
        orders = list(itertools.permutations(range(4)))
        counts = np.zeros((2, len(orders)))
        for mine, other in zip(ours, theirs, strict=True):
            counts[0, orders.index(mine.order)] += 1
            counts[1, orders.index(tuple(other["fn_idx"].tolist()))] += 1
        assert stats.chi2_contingency(counts).pvalue > 1e-3

    def test_of_a_blur_are_those_of_gaussian_blur(self) -> None:
        rng, op = np.random.default_rng(0), Blur(sigma_px=(0.1, 2.0), prob=1.0)
        theirs = torchvisions_draws(v2.GaussianBlur(23, sigma=(0.1, 2.0)), torch.empty(3, 1, 1))
        ours = [op.plan(rng) for _ in range(DRAWS)]
        assert_same_distribution(ours, [drawn["sigma"][0] for drawn in theirs], "sigma")

    def test_of_a_rotation_are_those_of_random_rotation(self) -> None:
        rng, op = np.random.default_rng(0), Rotate(max_deg=25.0, prob=1.0)
        theirs = torchvisions_draws(v2.RandomRotation(25), torch.empty(3, 1, 1))
        ours = [op.plan(rng) for _ in range(DRAWS)]
        assert_same_distribution(ours, [drawn["angle"] for drawn in theirs], "angle")

    @pytest.mark.parametrize(
        ("op", "transform"),
        [
            (Flip(prob=0.5), v2.RandomHorizontalFlip(0.5)),
            (Grey(prob=0.2), v2.RandomGrayscale(0.2)),
            (Solarise(prob=0.1), v2.RandomSolarize(128, p=0.1)),
            (Blur(prob=0.3), v2.RandomApply([v2.GaussianBlur(3, sigma=2.0)], p=0.3)),
            (ColorJitter(prob=0.8), v2.RandomApply([v2.ColorJitter((0.1, 0.2))], p=0.8)),
        ],
        ids=lambda value: getattr(value, "op", type(value).__name__),
    )
    def test_of_chance_are_as_frequent(self, op: Any, transform: Any) -> None:
        image = noise(4, 4)
        rng, count = np.random.default_rng(0), DRAWS // 2
        plans = [op.plan(rng) for _ in range(count)]
        ours = sum(plan is not None and plan is not False for plan in plans)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = sum(
                not torch.equal(transform(tensor(image)), tensor(image)) for _ in range(count)
            )
        assert 0 < theirs < count
        table = [[ours, count - ours], [theirs, count - theirs]]
        assert stats.chi2_contingency(table).pvalue > 1e-3
