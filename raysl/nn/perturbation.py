"""Perturb images by a symmetric conditional density, for conditional NCE."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from raysl.nn.rotations import NUM_ROTATIONS, rotate

Perturbation = Literal["gaussian", "turn"]


@torch.no_grad()
def perturb(
    images: Tensor, perturbations: Sequence[Perturbation], noise_std_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Derive noise from images, each by one of the perturbations.

    gaussian adds noise whose standard deviation is log-uniform; turn rotates by one, two or three
    quarter turns. Both are symmetric: x to y is as likely as y to x. So is their mixture, because
    the choice does not depend on the image.

    Args:
        images: ``(N, C, S, S)``.
        perturbations: At least one; all are equally likely.
        noise_std_range: Smallest and largest standard deviation of the noise, both > 0.

    Returns:
        The perturbed images ``(N, C, S, S)`` and the index of each one's perturbation in the list,
        ``(N,)``, the first one of equal names. Drawn from torch's global generator.

    Source: arXiv:1806.03664v1 for Gaussian noise and for the use of symmetry.
    """
    n, device = len(images), images.device
    low, high = (math.log(std) for std in noise_std_range)
    std = torch.empty(n, device=device).uniform_(low, high).exp().to(images.dtype)
    noisy = images + std.view(-1, 1, 1, 1) * torch.randn_like(images)
    rotated = rotate(images, torch.randint(1, NUM_ROTATIONS, (n,), device=device))
    first_indices = torch.tensor(
        [perturbations.index(name) for name in perturbations], device=device
    )
    indices = first_indices[torch.randint(len(perturbations), (n,), device=device)]
    is_turn = torch.tensor([name == "turn" for name in perturbations], device=device)[indices]
    return torch.where(is_turn.view(-1, 1, 1, 1), rotated, noisy), indices
