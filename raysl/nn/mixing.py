"""Mix pairs of images of a batch and their labels: mixup and cutmix.

mixup: H. Zhang, M. Cisse, Y. Dauphin, D. Lopez-Paz, 2017, arXiv:1710.09412v2. cutmix: S. Yun et
al., 2019, arXiv:1905.04899v2.
"""

import math

import torch
from torch import Tensor


def mix_batch(
    images: Tensor, targets: Tensor, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mix each image with its counterpart in the reversed batch, by one ratio for the batch.

    Args:
        images: ``(N, 3, H, W)``.
        targets: Class probabilities ``(N, C)``.
        mixup: alpha of the ratio's Beta(alpha, alpha) for a mean of pixels; 0 disables it.
        cutmix: alpha of the ratio for a rectangle of the other image; 0 disables it. With both, one
            of them is drawn.

    Returns:
        New images and targets; drawn from torch's global CPU generator.

    Source: arXiv:1710.09412v2, sec. 2; arXiv:1905.04899v2, Eqs. (1) and (2). Images are paired as
    in timm, which MAE's fine-tuning uses.
    """
    is_cutmix = bool(torch.rand(()) < 0.5) if mixup > 0 and cutmix > 0 else cutmix > 0
    alpha = cutmix if is_cutmix else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    others = images.flip(0)
    if is_cutmix:
        images, share = _with_rectangle(images, others, share)
    else:
        images = share * images + (1 - share) * others
    return images, share * targets + (1 - share) * targets.flip(0)


def _with_rectangle(images: Tensor, others: Tensor, share: float) -> tuple[Tensor, float]:
    """Paste a rectangle of the other images; also return the remaining share of the original."""
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
