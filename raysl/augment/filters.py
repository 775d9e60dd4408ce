"""Operations on the fine detail of a view: blur, Sobel edges, noise."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import cv2
import numpy as np
from pydantic import Field, model_validator

from raysl.augment.base import DeviceOperation, Floats, Operation, to_device, to_levels, to_luma
from raysl.augment.crop import Image
from raysl.augment.random import uniform
from raysl.config.base import Fraction, PositiveFloat, Probability, check_ranges

if TYPE_CHECKING:
    from torch import Tensor


class Blur(DeviceOperation):
    """Gaussian blur.

    Source: Chen et al. 2020, arXiv:2002.05709v3, appendix A.
    """

    op: Literal["blur"] = "blur"
    prob: Probability = 0.5
    sigma_px: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """Range of the standard deviation, in pixels of the view."""
    kernel_fraction: Fraction | None = 0.1
    """Largest kernel size, as a fraction of the view's side (SimCLR: a tenth); null ends the kernel
    at three standard deviations."""
    num_params: ClassVar[int] = 2

    def draw(self, rng: np.random.Generator) -> float:
        """Draw the standard deviation in pixels."""
        return uniform(rng, *self.sigma_px)

    def num_taps(self, sigma_px: float, size_px: int) -> int:
        """Return the number of taps of the kernel, an odd number, for a view of side ``size_px``.

        Taps beyond three standard deviations cost time and change nothing, so the kernel ends
        there at the latest.
        """
        taps = 2 * int(np.ceil(3 * sigma_px)) + 1
        if self.kernel_fraction is None:
            return taps
        return min(taps, max(3, int(size_px * self.kernel_fraction) | 1))

    def transform(self, image: Image, sigma_px: float) -> Image:
        """Blur with a Gaussian of standard deviation ``sigma_px`` > 0."""
        # Two passes with one kernel: twice as fast as cv2.GaussianBlur, at most one level apart.
        taps = self.num_taps(sigma_px, len(image))
        kernel = cv2.getGaussianKernel(taps, sigma_px, ktype=cv2.CV_32F)
        return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)  # type: ignore[return-value]

    def to_numbers(self, sigma_px: float, size_px: int) -> tuple[float, ...]:
        """Return the standard deviation in pixels and the number of taps."""
        return sigma_px, self.num_taps(sigma_px, size_px)

    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Blur each image with its own Gaussian: two passes, each a sum of shifted images."""
        from torch.nn.functional import pad  # noqa: PLC0415 - data workers load no torch

        sigma_px, taps = params[:, :1], params[:, 1:]
        half = min(int(taps.max()) // 2, images.shape[2] - 1)
        distance = np.abs(np.arange(-half, half + 1))[None]
        weights = np.exp(-0.5 * (distance / sigma_px) ** 2)
        weights[distance > taps // 2] = 0  # each image has its own number of taps
        weights /= weights.sum(axis=1, keepdims=True)
        kernel = to_device(weights.astype(np.float32), images)
        result = pad(images, (half, half, half, half), mode="reflect")
        for dim in (2, 3):
            size, shifted = images.shape[dim], result
            result = shifted.narrow(dim, half, size) * kernel[:, half].view(-1, 1, 1, 1)
            for tap in (tap for tap in range(2 * half + 1) if tap != half):
                result.addcmul_(shifted.narrow(dim, tap, size), kernel[:, tap].view(-1, 1, 1, 1))
        return to_levels(result)


class Sobel(DeviceOperation):
    """Replace the image by its edges: the magnitude of the Sobel gradient of its luma.

    The largest response of the 3 x 3 operator to an edge between 0 and 255 is 4 * 255; dividing by
    four keeps the edge's height.

    Source: Chen et al. 2020, arXiv:2002.05709v3, figure 4.
    """

    op: Literal["sobel"] = "sobel"
    prob: Probability = 0.5

    def transform(self, image: Image, params: bool) -> Image:
        """Write the gradient's magnitude into all three channels."""
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        across = cv2.Sobel(grey, cv2.CV_32F, 1, 0, borderType=cv2.BORDER_REPLICATE)
        down = cv2.Sobel(grey, cv2.CV_32F, 0, 1, borderType=cv2.BORDER_REPLICATE)
        # cv2.magnitude is not reproducible: its last bit depends on the arrays' memory addresses,
        # which changes one pixel in a thousand by one level.
        magnitude = np.sqrt(across * across + down * down)
        edges = np.clip(np.rint(magnitude / 4), 0, 255).astype(np.uint8)
        return cv2.cvtColor(edges, cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]

    def transform_batch(self, images: "Tensor", params: Floats) -> "Tensor":
        """Write the gradient's magnitude into all three channels of every image."""
        from torch.nn.functional import conv2d, pad  # noqa: PLC0415 - data workers load no torch

        grey = pad(to_luma(images).round(), (1, 1, 1, 1), mode="replicate")
        across = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=np.float32)
        kernels = to_device(np.stack([across, across.T]), images).unsqueeze(1)
        edges = conv2d(grey, kernels).square().sum(1, keepdim=True).sqrt()
        return to_levels(edges / 4).expand_as(images)


class NoisePlan(NamedTuple):
    """Gaussian noise: its strength, and the seed of its random numbers."""

    sigma: float  # for pixels in [0, 1]
    seed: int


class Noise(Operation):
    """Gaussian noise, independent for each channel of each pixel.

    Source: Chen et al. 2020, arXiv:2002.05709v3, figure 4 (its strength is not published).
    """

    op: Literal["noise"] = "noise"
    prob: Probability = 0.5
    sigma: tuple[
        Annotated[float, Field(ge=0.0, le=1.0)], Annotated[float, Field(ge=0.0, le=1.0)]
    ] = (0.02, 0.1)
    """Range of the standard deviation, for pixels in [0, 1]."""

    @model_validator(mode="after")
    def _check_order(self) -> "Noise":
        check_ranges(self, "sigma")
        return self

    def draw(self, rng: np.random.Generator) -> NoisePlan:
        """Draw the strength, and the seed of the noise."""
        return NoisePlan(uniform(rng, *self.sigma), int(rng.integers(1 << 62)))

    def transform(self, image: Image, params: NoisePlan) -> Image:
        """Add the noise, round and clamp."""
        rng = np.random.Generator(np.random.Philox(key=params.seed))
        noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(255 * params.sigma)
        return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
