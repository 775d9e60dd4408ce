"""Measure without labels how embeddings are distributed: alignment, uniformity, rank, spectrum."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_ROWS = 512  # rows of which all pairs are compared
_ROWS_AT_ONCE = 8192  # converted to float64 at a time
# Relative to the largest eigenvalue: rounding errors of a dimension without variance.
_NO_VARIANCE = 1e-12
_FIRST_FITTED, _LAST_FITTED = 4, 100  # ranks; see fit_power_law


@torch.no_grad()
def alignment(z0: Tensor, z1: Tensor) -> Tensor:
    """Return the mean squared distance of the two views of an image on the unit sphere.

    Args:
        z0: ``(N, D)``, any float dtype, not normalised.
        z1: ``(N, D)``, not normalised; row i comes from the same image as ``z0[i]``.

    Returns:
        Scalar float32 in [0, 4]: 0 if both views of every image have the same direction.

    Source: Wang and Isola 2020, arXiv:2005.10242v10, sec. 4.1.1, with alpha = 2.
    """
    return (F.normalize(z0.float(), dim=1) - F.normalize(z1.float(), dim=1)).square().sum(1).mean()


@torch.no_grad()
def uniformity(z: Tensor, *, most_rows: int = _MOST_ROWS) -> Tensor:
    """Return the log of the mean Gaussian potential of all pairs of images.

    Args:
        z: ``(N, D)``, any float dtype, not normalised; a single row gives 0.
        most_rows: Only this many first rows are compared, because the number of pairs grows with N
            squared.

    Returns:
        Scalar float32 in [-8, 0]: 0 if all images have the same direction, lower if they are spread
        more evenly.

    Source: Wang and Isola 2020, arXiv:2005.10242v10, sec. 4.1.2, with t = 2.
    """
    if len(z) < 2:
        return z.new_zeros((), dtype=torch.float32)
    squared = torch.pdist(F.normalize(z[:most_rows].float(), dim=1)).square()
    return squared.mul(-2).exp().mean().log()


@torch.no_grad()
def entropy(probabilities: Tensor) -> Tensor:
    """Return the mean entropy in nats of the rows of ``(N, K)`` probabilities."""
    p = probabilities.float()
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=1).mean()


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Return the mean standard deviation of the normalised features, times sqrt(D).

    Args:
        features: ``(N, D)``, any float dtype.

    Returns:
        Scalar float32 in [0, 1]: 0 if all images have the same direction, about 1 if directions are
        uniform on the sphere.

    Source: Chen and He 2020, arXiv:2011.10566v1, sec. 4.1.
    """
    directions = F.normalize(features.float(), dim=1)
    return directions.std(dim=0, unbiased=False).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Return the exponential of the entropy of the normalised singular values.

    Args:
        features: ``(N, D)``, any float dtype; a large N is processed in parts.

    Returns:
        Scalar float32 in [1, min(N, D)]; 0 if all features are zero, nan if one is not finite.

    Source: RankMe, eq. (1), Garrido et al. 2022, arXiv:2210.02885v3; Roy and Vetterli 2007.
    Departs: Computed from the Gram matrix of the shorter side, whose eigenvalues are the squared
        singular values: several times faster than a decomposition of the features.
    """
    if not features.isfinite().all():  # eigvalsh would raise before the loss is checked
        return features.new_tensor(math.nan, dtype=torch.float32)
    values = torch.linalg.eigvalsh(_gram(features)).clamp_min(0).sqrt()
    total = values.sum()
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -(shares * shares.clamp_min(torch.finfo(values.dtype).tiny).log()).sum()
    return torch.where(total > 0, entropy.exp(), 0.0).float()


@torch.no_grad()
def covariance_spectrum(features: Tensor) -> Tensor:
    """Return the eigenvalues of the features' covariance, the largest first.

    Args:
        features: ``(M, D)``, any float dtype, finite.

    Returns:
        ``(min(M - 1, D),)`` float64, >= 0; their sum is the variance of all dimensions together.
    """
    num_rows, width = features.shape
    center = features.mean(dim=0, dtype=torch.float64)
    values: Tensor = torch.linalg.eigvalsh(_gram(features, center=center)) / max(num_rows - 1, 1)
    return values.flip(0).clamp_min(0)[: min(num_rows - 1, width)]


class PowerLaw(NamedTuple):
    """A power law: the eigenvalue of rank n is ``scale * n ** -exponent``."""

    exponent: float
    scale: float
    first: int
    """Rank of the first fitted eigenvalue, from 1."""
    last: int
    """Rank of the last fitted eigenvalue."""


@torch.no_grad()
def fit_power_law(
    eigenvalues: Tensor, *, first: int = _FIRST_FITTED, last: int = _LAST_FITTED
) -> PowerLaw | None:
    """Fit a straight line to the logarithm of eigenvalues over the logarithm of their ranks.

    Args:
        eigenvalues: ``(K,)`` float64 >= 0, the largest first.
        first: Rank of the first one to fit, from 1.
        last: Rank of the last one to fit; eigenvalues that are only rounding errors are left out.

    Returns:
        The power law, or None if fewer than two eigenvalues remain.

    Source: Agrawal et al. 2022, "alpha-ReQ", NeurIPS 35. The paper states neither range nor
    weights: ranks 4 to 100, weighted by 1 / rank so that decades count equally, are from the
    authors' code.
    """
    if not len(eigenvalues) or not eigenvalues.isfinite().all():
        return None
    last = min(last, int((eigenvalues > _NO_VARIANCE * eigenvalues[0]).sum()))
    if last <= first:
        return None
    ranks = torch.arange(first, last + 1, dtype=torch.float64, device=eigenvalues.device)
    weights, x, y = 1 / ranks, ranks.log(), eigenvalues[first - 1 : last].double().log()
    x_mean, y_mean = ((weights * each).sum() / weights.sum() for each in (x, y))
    slope = (weights * (x - x_mean) * (y - y_mean)).sum() / (weights * (x - x_mean).square()).sum()
    return PowerLaw(-float(slope), float((y_mean - slope * x_mean).exp()), first, last)


def _gram(features: Tensor, *, center: Tensor | None = None) -> Tensor:
    """Return the Gram matrix of ``(M, D)`` features in float64: ``(min(M, D),) * 2``."""

    def centred(part: Tensor) -> Tensor:
        return part.double() if center is None else part.double() - center

    if features.shape[0] <= features.shape[1]:
        x = centred(features)
        return x @ x.T
    width = features.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    for part in features.split(_ROWS_AT_ONCE):
        x = centred(part)
        gram.addmm_(x.T, x)
    return gram


def off_diagonal(square: Tensor) -> Tensor:
    """Return a view of a ``(D, D)`` matrix without its diagonal, ``(D - 1, D)``."""
    d = len(square)
    # Flattened from entry 1 on, every (D + 1)th entry is on the diagonal.
    return square.flatten()[1:].view(d - 1, d + 1)[:, :-1]


def log_mean_exp_on_sphere(dim: int, concentration: float) -> float:
    r"""Return the log of the mean of exp(concentration * cosine) over the unit sphere.

    It is the normaliser of the von Mises-Fisher density relative to the uniform one:
    :math:`{}_0F_1(; D/2; \kappa^2/4)`, summed as its power series.

    Args:
        dim: D, the space that the sphere lies in, > 1.
        concentration: kappa, > 0.
    """
    half, x = dim / 2, 2 * math.log(concentration / 2)
    terms = int(2 * concentration) + 100  # terms fall like those of exp(kappa / 2) beyond kappa
    logs = [
        k * x + math.lgamma(half) - math.lgamma(k + half) - math.lgamma(k + 1) for k in range(terms)
    ]
    largest = max(logs)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in logs))
