"""Networks that generate images from features, and that tell generated images from real ones.

The layers follow A. Radford, L. Metz, S. Chintala: "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", 2015, arXiv:1511.06434v2, as in the context
encoder's train.lua.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NATIVE_SIDE_PX = 4  # side of the smallest map; each layer doubles or halves it
MAX_WIDENING = 8  # most channels, as a multiple of the width
LEAK = 0.2  # slope of the leaky ReLU below 0
INIT_STD = 0.02


def num_doublings(size_px: int) -> int:
    """Return how many doublings of 4 px come closest to a size; at least one."""
    return max(1, round(math.log2(size_px / NATIVE_SIDE_PX)))


class UpConvDecoder(nn.Module):
    """Map features to square images by up-convolutions that double 4 px until the size is reached.

    Args:
        in_dim: Number of features.
        size_px: Side of the images; determines the number of layers. Sizes other than 4 times a
            power of two are resized from the nearest of those.
        width: Channels of the last hidden layer; each one before it has twice as many, up to 8
            times.

    Departs: The last layer is linear: train.lua has tanh for images in [-1, 1], ours are
    normalised. Convolutions have no bias; train.lua sets theirs to 0 at every step.
    """

    def __init__(self, in_dim: int, *, size_px: int, width: int = 64) -> None:
        super().__init__()
        doublings = num_doublings(size_px)
        widening = min(MAX_WIDENING, 2 ** (doublings - 1))
        channels = width * widening
        layers: list[nn.Module] = [nn.ConvTranspose2d(in_dim, channels, 4, bias=False)]  # 4 px
        for _ in range(doublings - 1):
            widening = max(1, widening // 2)
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            layers.append(nn.ConvTranspose2d(channels, width * widening, 4, 2, 1, bias=False))
            channels = width * widening
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        layers.append(nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False))
        self.layers = nn.Sequential(*layers)
        init_dcgan_(self)

    def forward(self, features: Tensor, size_px: int) -> Tensor:
        """Map ``(N, in_dim)`` to ``(N, 3, size_px, size_px)``."""
        return resize(self.layers(features[:, :, None, None]), size_px)


class Discriminator(nn.Module):
    """Map square images to one logit each, positive for real images.

    Args:
        size_px: Side of the images; determines the number of layers. Sizes other than 4 times a
            power of two are resized to the nearest of those.
        width: Channels of the first layer; each one after it has twice as many, up to 8 times.
    """

    def __init__(self, *, size_px: int, width: int = 64) -> None:
        super().__init__()
        halvings = num_doublings(size_px)
        self.native_px = NATIVE_SIDE_PX * 2**halvings
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1, bias=False)]
        layers.append(nn.LeakyReLU(LEAK, inplace=True))
        channels = width
        # As in train_random.lua, where 128 px need one more layer: the first layers do not widen.
        for halving in range(1, halvings):
            widening = 2 ** max(0, halving - max(0, halvings - 4))
            layers.append(nn.Conv2d(channels, width * widening, 4, 2, 1, bias=False))
            channels = width * widening
            layers += [nn.BatchNorm2d(channels), nn.LeakyReLU(LEAK, inplace=True)]
        layers.append(nn.Conv2d(channels, 1, NATIVE_SIDE_PX, bias=False))
        self.layers = nn.Sequential(*layers)
        init_dcgan_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, S, S)`` to logits ``(N,)``."""
        return self.layers(resize(images, self.native_px)).flatten()  # type: ignore[no-any-return]


def resize(images: Tensor, size_px: int) -> Tensor:
    """Resize ``(N, C, S, S)`` linearly, averaging when it shrinks; unchanged if the size fits."""
    if images.shape[-1] == size_px:
        return images
    if images.dtype != torch.float64:
        images = images.float()  # the antialiasing filter has no bfloat16 on every device
    return F.interpolate(images, size=(size_px, size_px), mode="bilinear", antialias=True)


def init_dcgan_(module: nn.Module) -> None:
    """Draw weights of standard deviation 0.02, around 0 for convolutions, 1 for batch norm."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, INIT_STD)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, INIT_STD)
