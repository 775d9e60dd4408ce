"""Noise made of an image by a symmetric conditional density: doing is as likely as undoing."""

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
    """Make noise of images, of each by one of the perturbations.

    gaussian adds noise whose deviation is drawn uniformly in its logarithm; turn turns by one, two
    or three quarters. Either takes x to y as often as y to x, and so does a mixture of them, as
    which one is taken does not depend on the image.

    Args:
        images: ``(N, C, S, S)``.
        perturbations: At least one; each is as likely.
        noise_std_range: Smallest and largest deviation, both > 0.

    Returns:
        The noise ``(N, C, S, S)`` and the place of its perturbation in the list, ``(N,)``, which is
        the first of equal names. All draws are from torch's global generator.

    Source: arXiv:1806.03664v1 for Gaussian noise and for what symmetry is good for.
    """
    n, device = len(images), images.device
    low, high = (math.log(std) for std in noise_std_range)
    std = torch.empty(n, device=device).uniform_(low, high).exp().to(images.dtype)
    noisy = images + std.view(-1, 1, 1, 1) * torch.randn_like(images)
    turned = rotate(images, torch.randint(1, NUM_ROTATIONS, (n,), device=device))
    first = torch.tensor([perturbations.index(name) for name in perturbations], device=device)
    places = first[torch.randint(len(perturbations), (n,), device=device)]
    is_turn = torch.tensor([name == "turn" for name in perturbations], device=device)[places]
    return torch.where(is_turn.view(-1, 1, 1, 1), turned, noisy), places
