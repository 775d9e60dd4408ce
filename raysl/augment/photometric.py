"""Change the pixels of a view: colour jitter, grey, blur, solarise, noise, Sobel, cutout.

The definitions are torchvision's on uint8 images (clamped and rounded after each step), because the
SimCLR and MoCo v2 recipes were tuned with them.
"""

from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from raysl.augment.crop import Image
from raysl.augment.random import uniform

# ITU-R 601-2 luma, as in PIL's convert("L") and OpenCV's RGB2GRAY.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_IDENTITY = np.eye(3, 4, dtype=np.float32)
_LEVELS = np.arange(256, dtype=np.float32)


BrightnessKind = Literal["multiply", "add"]
"""Whether brightness multiplies the pixels, which also changes the contrast, or is added."""


class JitterPlan(NamedTuple):
    """Factors of one colour jitter, and their order."""

    brightness: float  # multiplies the pixels, or is added to pixels in [0, 1]
    contrast: float  # 0 is the mean grey level everywhere, 1 the image
    saturation: float  # 0 is grey, 1 the image
    hue: float  # added to the hue, in turns, in [-0.5, 0.5]
    order: tuple[int, ...]  # a permutation of (0, 1, 2, 3) = brightness, contrast, saturation, hue
    brightness_kind: BrightnessKind = "multiply"


def plan_jitter(
    rng: np.random.Generator,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    prob: float,
    brightness_kind: BrightnessKind = "multiply",
) -> JitterPlan | None:
    """Draw the factors of a colour jitter, or None with probability 1 - prob.

    Args:
        rng: The random stream of this view.
        brightness: b >= 0; the factor is uniform in [max(0, 1 - b), 1 + b]. For the kind ``add``,
            the added value is uniform in [-b, b], for pixels in [0, 1].
        contrast: c >= 0; the factor is uniform in [max(0, 1 - c), 1 + c].
        saturation: Likewise.
        hue: h in [0, 0.5]; the shift is uniform in [-h, h] turns.
        prob: Probability that the jitter is applied.
        brightness_kind: Whether brightness multiplies or is added.

    Source: Chen et al. 2020, arXiv:2002.05709v3, appendix A; torchvision's ColorJitter. Added
    brightness: the code of BYOL's authors (deepmind-research, byol/utils/augmentations.py).
    """
    if rng.random() >= prob:
        return None
    ranges = [(max(0.0, 1 - x), 1 + x) for x in (brightness, contrast, saturation)]
    if brightness_kind == "add":
        ranges[0] = (-brightness, brightness)
    b, c, s = (uniform(rng, *bounds) for bounds in ranges)
    shift = uniform(rng, -hue, hue)
    return JitterPlan(b, c, s, shift, tuple(rng.permutation(4).tolist()), brightness_kind)


def apply_jitter(image: Image, plan: JitterPlan) -> Image:
    """Apply a colour jitter to ``(H, W, 3)`` uint8 RGB; returns a new array."""
    steps = (
        lambda x: apply_brightness(x, plan.brightness, kind=plan.brightness_kind),
        lambda x: apply_contrast(x, plan.contrast),
        lambda x: apply_saturation(x, plan.saturation),
        lambda x: apply_hue(x, plan.hue),
    )
    for step in plan.order:
        image = steps[step](image)
    return image


def apply_brightness(image: Image, value: float, *, kind: BrightnessKind = "multiply") -> Image:
    """Multiply by ``value`` >= 0, or add 255 times it, and clamp to [0, 255]."""
    if kind == "multiply":
        return _mix_channels(image, _IDENTITY * value)
    shifted = _IDENTITY.copy()
    shifted[:, 3] = 255 * value
    return _mix_channels(image, shifted)


def apply_contrast(image: Image, factor: float) -> Image:
    """Blend with the mean grey level of the image by ``factor`` >= 0."""
    mean = float(np.dot(cv2.mean(image)[:3], _LUMA))
    blend = _IDENTITY * factor
    blend[:, 3] = round(mean) * (1 - factor)
    return _mix_channels(image, blend)


def apply_saturation(image: Image, factor: float) -> Image:
    """Blend with the grey image by ``factor`` >= 0."""
    blend = _IDENTITY * factor
    blend[:, :3] += _LUMA * (1 - factor)
    return _mix_channels(image, blend)


def _mix_channels(image: Image, matrix: npt.NDArray[np.float32]) -> Image:
    """Apply a (3, 4) matrix to (R, G, B, 1); rounds and clamps. Three times as fast as a table."""
    return cv2.transform(image, matrix)  # type: ignore[return-value]


def apply_hue(image: Image, shift: float) -> Image:
    """Shift the hue by ``shift`` turns in [-0.5, 0.5]; value and saturation stay."""
    if shift == 0:
        return image
    # OpenCV maps a full turn to 256 levels in one direction and to 255 in the other.
    turned = np.rint((_LEVELS / 256 + shift) % 1 * 255).astype(np.uint8)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] = cv2.LUT(hsv[..., 0], turned)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)  # type: ignore[return-value]


def apply_grey(image: Image) -> Image:
    """Replace ``(H, W, 3)`` uint8 RGB by its luma in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]


def plan_blur(
    rng: np.random.Generator, *, sigma_px: tuple[float, float], prob: float
) -> float | None:
    """Draw the standard deviation of a Gaussian in pixels, or None with probability 1 - prob."""
    if rng.random() >= prob:
        return None
    return uniform(rng, *sigma_px)


def blur_taps(sigma_px: float, *, longest: int | None = None) -> int:
    """Return the number of taps of a Gaussian kernel, odd.

    Taps beyond three standard deviations cost time and change nothing, so the kernel ends there, or
    at ``longest``: SimCLR limits it to a tenth of the image's side.

    Source: Chen et al. 2020, arXiv:2002.05709v3, appendix A.
    """
    taps = 2 * int(np.ceil(3 * sigma_px)) + 1
    return taps if longest is None else min(taps, longest)


def apply_blur(image: Image, sigma_px: float, *, taps: int) -> Image:
    """Blur ``(H, W, 3)`` uint8 with a Gaussian of standard deviation ``sigma_px`` > 0."""
    # Two passes with one kernel: twice as fast as cv2.GaussianBlur, at most one level apart.
    kernel = cv2.getGaussianKernel(taps, sigma_px, ktype=cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)  # type: ignore[return-value]


def apply_solarise(image: Image, *, threshold: int = 128) -> Image:
    """Invert the pixels at or above ``threshold`` in [0, 256].

    Source: Grill et al. 2020, arXiv:2006.07733v3, appendix B.
    """
    levels = np.where(np.arange(256) >= threshold, 255 - np.arange(256), np.arange(256))
    return cv2.LUT(image, levels.astype(np.uint8))  # type: ignore[return-value]


def plan_chance(rng: np.random.Generator, *, prob: float) -> bool:
    """Draw whether to apply an operation without parameters."""
    return bool(rng.random() < prob)


class NoisePlan(NamedTuple):
    """Gaussian noise: its strength, and the seed that it is drawn from."""

    sigma: float  # for pixels in [0, 1]
    seed: int


def plan_noise(
    rng: np.random.Generator, *, sigma: tuple[float, float], prob: float
) -> NoisePlan | None:
    """Draw the strength and the seed of the noise, or None with probability 1 - prob."""
    if rng.random() >= prob:
        return None
    return NoisePlan(uniform(rng, *sigma), int(rng.integers(1 << 62)))


def apply_noise(image: Image, plan: NoisePlan) -> Image:
    """Add independent Gaussian noise to each channel of each pixel of ``(H, W, 3)`` uint8.

    Source: Chen et al. 2020, arXiv:2002.05709v3, figure 4 (its strength is not published).
    """
    rng = np.random.Generator(np.random.Philox(key=plan.seed))
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(255 * plan.sigma)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def apply_sobel(image: Image) -> Image:
    """Replace ``(H, W, 3)`` uint8 RGB by the magnitude of its luma's Sobel gradient.

    The largest response of the 3 x 3 operator to an edge between 0 and 255 is 4 * 255; dividing by
    four keeps the edge's height.

    Source: Chen et al. 2020, arXiv:2002.05709v3, figure 4.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    across = cv2.Sobel(grey, cv2.CV_32F, 1, 0, borderType=cv2.BORDER_REPLICATE)
    down = cv2.Sobel(grey, cv2.CV_32F, 0, 1, borderType=cv2.BORDER_REPLICATE)
    edges = np.clip(np.rint(cv2.magnitude(across, down) / 4), 0, 255).astype(np.uint8)
    return cv2.cvtColor(edges, cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]


class CutoutPlan(NamedTuple):
    """A square to fill, in fractions of the view's side."""

    row: float  # of its centre, in [0, 1)
    column: float
    side: float


def plan_cutout(
    rng: np.random.Generator, *, side: tuple[float, float], prob: float
) -> CutoutPlan | None:
    """Draw the square, its centre anywhere in the view, or None with probability 1 - prob."""
    if rng.random() >= prob:
        return None
    return CutoutPlan(float(rng.random()), float(rng.random()), uniform(rng, *side))


def apply_cutout(image: Image, plan: CutoutPlan, *, fill: int) -> Image:
    """Fill a square of ``(H, W, 3)`` uint8 with ``fill``; it is cut off at the border.

    Source: DeVries and Taylor 2017, arXiv:1708.04552v2, sec. 3.2.
    """
    height, width = image.shape[:2]
    half = plan.side * min(height, width) / 2
    top, left = round(plan.row * height - half), round(plan.column * width - half)
    bottom, right = round(plan.row * height + half), round(plan.column * width + half)
    result = image.copy()
    result[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = fill
    return result
