"""A stationary Gaussian over images, fitted to their power spectrum."""

import math

import torch
from torch import Tensor, nn

from raysl.nn.collectives import mean_over_ranks, rank_and_size


class SpectralGaussian(nn.Module):
    r"""Gaussian images with a given mean and, for each spatial frequency, covariance of colours.

    A covariance of pixels that only depends on their displacement is diagonal in the Fourier
    domain, up to a 3 x 3 block for each frequency k. With the unitary transform F, and L_k the
    Cholesky factor of the block C_k,

    .. math::
        x = m + F^{-1} (L_k (F z)_k)_k, \quad z \sim N(0, 1), \qquad
        \log p(x) = -\tfrac12 \sum_k \big( \|L_k^{-1} (F (x - m))_k\|^2 + \log\det C_k \big)
                    - \tfrac{3 S^2}{2} \log 2\pi

    Mean and covariances are averages over all images seen, identical on every rank, and over one
    pseudo-image of mean 0 and covariance 1, which keeps them positive definite.

    Args:
        size_px: S, side of the images.
    """

    _weight: Tensor
    mean: Tensor
    covariance: Tensor
    count: Tensor

    def __init__(self, size_px: int) -> None:
        super().__init__()
        self.size_px = size_px
        columns = size_px // 2 + 1
        white = torch.eye(3, dtype=torch.complex64).repeat(size_px, columns, 1, 1)
        self.register_buffer("mean", torch.zeros(3, size_px, size_px))
        # (S, S // 2 + 1, 18): 3 x 3 of real and imaginary parts. Not complex, which some code does
        # not support; three dimensions, which no code converts to channels last.
        self.register_buffer("covariance", torch.view_as_real(white).flatten(2))
        self.register_buffer("count", torch.ones(()))
        # The half plane also stands for the negative frequencies, except in two columns that
        # contain both.
        weight = torch.full((columns,), 2.0)
        weight[0] = 1.0
        if size_px % 2 == 0:
            weight[-1] = 1.0
        self.register_buffer("_weight", weight, persistent=False)

    @torch.no_grad()
    def fit_(self, images: Tensor) -> None:
        """Add the images of all ranks, ``(N, 3, S, S)`` on each, to the averages."""
        images = images.to(self.mean.dtype)
        num_new = len(images) * rank_and_size()[1]
        share = num_new / (self.count + num_new)
        center = mean_over_ranks(images.mean(dim=0))
        rows = self._transform(images - center)
        within = mean_over_ranks(_outer(rows) / len(rows))
        shift = self._transform(center - self.mean)[None]
        between = _outer(shift)
        self.covariance.mul_(1 - share).add_(share * within + share * (1 - share) * between)
        self.mean.lerp_(center, share)
        self.count.add_(num_new)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Draw ``(count, 3, S, S)`` from torch's global generator."""
        white = torch.randn(count, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
        rows = torch.einsum("hwcd,ndhw->nchw", self._factor(), self._transform(white))
        size = [self.size_px, self.size_px]
        images: Tensor = torch.fft.irfft2(rows, s=size, norm="ortho")
        return self.mean + images

    @torch.no_grad()
    def log_prob(self, images: Tensor) -> Tensor:
        """Return the log density in nats, ``(N,)``, of ``(N, 3, S, S)``."""
        rows = self._transform(images.to(self.mean.dtype) - self.mean)
        factor = self._factor()
        columns = rows.permute(2, 3, 1, 0)  # (S, S // 2 + 1, 3, N)
        white: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
        squares = (white.abs().square().sum(dim=2) * self._weight[:, None]).sum(dim=(0, 1))
        diagonal: Tensor = factor.diagonal(dim1=-2, dim2=-1).real.log().sum(dim=2)
        log_det = 2 * (diagonal * self._weight).sum()
        return -0.5 * (squares + log_det + self.mean.numel() * math.log(2 * math.pi))

    def _transform(self, images: Tensor) -> Tensor:
        """Return the half plane of frequencies, ``(..., S, S // 2 + 1)`` complex."""
        half: Tensor = torch.fft.rfft2(images, norm="ortho")
        return half

    def _factor(self) -> Tensor:
        """Return the Cholesky factors ``(S, S // 2 + 1, 3, 3)``, computed in double precision."""
        exact = torch.view_as_complex(self.covariance.double().unflatten(2, (3, 3, 2)))
        dtype = torch.complex64 if self.covariance.dtype == torch.float32 else torch.complex128
        factor: Tensor = torch.linalg.cholesky(exact)
        return factor.to(dtype)


def _outer(rows: Tensor) -> Tensor:
    """Sum x x^H over n: ``(N, 3, S, W)`` complex to ``(S, W, 18)`` real."""
    return torch.view_as_real(torch.einsum("nchw,ndhw->hwcd", rows, rows.conj())).flatten(2)
