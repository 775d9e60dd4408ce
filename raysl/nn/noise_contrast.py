"""Noise-contrastive estimation: learn an unnormalised density by classifying data against noise.

M. Gutmann, A. Hyvarinen: "Noise-contrastive estimation: A new estimation principle for unnormalized
statistical models", AISTATS 2010; the same, with any number of noise samples: "Noise-Contrastive
Estimation of Unnormalized Statistical Models, with Applications to Natural Image Statistics", JMLR
13:307-361, 2012. With noise made of the data: C. Ceylan, M. Gutmann: "Conditional Noise-Contrastive
Estimation of Unnormalised Models", 2018, arXiv:1806.03664v1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raysl.errors import ShapeError
from raysl.nn.precision import at_least_float32


def noise_contrastive_loss(
    data_logits: Tensor,
    noise_logits: Tensor,
    *,
    data_log_noise: Tensor,
    noise_log_noise: Tensor,
    num_noise: float,
) -> Tensor:
    r"""Compute the loss of a logistic regression of data against noise, on log density ratios.

    .. math::
        L = \frac{1}{N} \sum_n \Big[ \mathrm{softplus}(-u(x_n))
            + \sum_{k=1}^{K} \mathrm{softplus}(u(y_{nk})) \Big], \qquad
        u(x) = \log p_m(x) - \log p_n(x) - \log \nu

    At its minimum p_m is the density of the data, with its normaliser, wherever p_n > 0.

    Args:
        data_logits: log p_m of the data, the learnt normaliser included, ``(N,)``.
        noise_logits: log p_m of each datum's K noise samples, ``(N, K)``.
        data_log_noise: log p_n of the data, ``(N,)``.
        noise_log_noise: log p_n of the noise samples, ``(N, K)``.
        num_noise: nu, number of noise samples per datum that the logits assume, > 0; K if all of
            them are given.

    Returns:
        Scalar >= 0, float32, or float64 for float64 logits. Where both densities are equal it is
        log(1 + nu) + K log(1 + 1 / nu).

    Raises:
        ShapeError: If the shapes do not fit.

    Source: The objective J_T of the JMLR paper, sec. 2, with the sign of a loss; for nu = 1 that of
    the AISTATS paper up to a factor of 1/2. Computed in float32 also under autocast.
    """
    n, k = len(data_logits), noise_logits.shape[-1]
    shapes = [tuple(x.shape) for x in (data_logits, data_log_noise)]
    noise_shapes = [tuple(x.shape) for x in (noise_logits, noise_log_noise)]
    if shapes != [(n,)] * 2 or noise_shapes != [(n, k)] * 2:
        raise ShapeError(
            "data_logits and data_log_noise must be (N,), noise_logits and noise_log_noise (N, K); "
            f"got {shapes[0]}, {shapes[1]}, {noise_shapes[0]}, {noise_shapes[1]}"
        )
    with torch.autocast(data_logits.device.type, enabled=False):
        data, noise = at_least_float32(data_logits), at_least_float32(noise_logits)
        u_data = data - at_least_float32(data_log_noise) - math.log(num_noise)
        u_noise = noise - at_least_float32(noise_log_noise) - math.log(num_noise)
        return (F.softplus(-u_data) + F.softplus(u_noise).sum(dim=1)).mean()


def conditional_noise_contrastive_loss(data_logits: Tensor, noise_logits: Tensor) -> Tensor:
    r"""Classify each datum against noise derived from it by a symmetric conditional density.

    .. math::
        L = \frac{2}{N K} \sum_n \sum_{k=1}^{K} \mathrm{softplus}(-G(x_n, y_{nk})), \qquad
        G(x, y) = \log p_m(x) + \log p_c(y | x) - \log p_m(y) - \log p_c(x | y)

    With p_c(y | x) = p_c(x | y) only the model remains in G, and no normaliser. At its minimum p_m
    is the data's density up to a factor, among images that the noise connects.

    Args:
        data_logits: log p_m of the data up to a constant, ``(N,)``.
        noise_logits: The same for the noise derived from each datum, ``(N, K)``.

    Returns:
        Scalar >= 0, float32, or float64 for float64 logits. Where data and noise are equally
        probable it is 2 log 2.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: The objective of arXiv:1806.03664v1 with symmetric conditional noise. Computed in
    float32 also under autocast.
    """
    if data_logits.ndim != 1 or noise_logits.shape[:-1] != data_logits.shape:
        raise ShapeError(
            "data_logits must be (N,) and noise_logits (N, K); "
            f"got {tuple(data_logits.shape)}, {tuple(noise_logits.shape)}"
        )
    with torch.autocast(data_logits.device.type, enabled=False):
        return (
            2
            * F.softplus(
                at_least_float32(noise_logits) - at_least_float32(data_logits)[:, None]
            ).mean()
        )
