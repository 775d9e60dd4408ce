"""Denoising score matching: learn the gradient of a log density by denoising.

P. Vincent: "A Connection Between Score Matching and Denoising Autoencoders", Neural Computation
23(7), 2011. At several noise levels: Y. Song, S. Ermon: "Generative Modeling by Estimating
Gradients of the Data Distribution", 2019, arXiv:1907.05600v3.
"""

from torch import Tensor

from raysl.errors import ShapeError
from raysl.nn.precision import at_least_float32


def denoising_score_loss(scores: Tensor, noise: Tensor, noise_std: Tensor) -> Tensor:
    r"""Compute the squared distance of the score at a noisy image to the direction back.

    .. math::
        L = \frac{1}{2 N D} \sum_n \| \sigma_n\, s(x_n + \sigma_n \epsilon_n) + \epsilon_n \|^2

    At its minimum s is the gradient of the log density of images with that noise.

    Args:
        scores: s, ``(N, ...)``, D values per image.
        noise: Epsilon, standard normal, same shape as ``scores``.
        noise_std: Sigma of each image, ``(N,)``, > 0.

    Returns:
        Scalar float32 >= 0, or float64 for float64 scores. A score of 0 gives 1/2 in expectation.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Eqs. (5) and (6) of arXiv:1907.05600v3 with lambda(sigma) = sigma^2.
    Departs: The mean over an image's values instead of their sum, so that it does not depend on
    the size of the images.
    """
    if scores.shape != noise.shape or noise_std.shape != scores.shape[:1]:
        raise ShapeError(
            f"scores and noise must be (N, ...) and noise_std (N,); got {tuple(scores.shape)}, "
            f"{tuple(noise.shape)}, {tuple(noise_std.shape)}"
        )
    sigma = at_least_float32(noise_std).view(-1, *[1] * (scores.ndim - 1))
    return 0.5 * (sigma * at_least_float32(scores) + at_least_float32(noise)).square().mean()
