"""Residual networks with torchvision's parameter names, and options for width, stem and norms.

He et al. 2016, Deep Residual Learning for Image Recognition, arXiv:1512.03385v1; the 3 x 3
convolution has the stride, as in torchvision and in Chen et al. 2020 (SimCLR v2),
arXiv:2006.10029v2.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.nn.convolution import Conv2d

Stem = Literal["imagenet", "cifar", "cifar_padded", "small"]
ShortcutEdge = Literal["inside", "zeros"]
NormName = Literal["batch", "group", "none"]
Norm = Callable[[int], nn.Module]

# SimCLR v2's code: the layer that weighs the kernels has 1/16 of their channels, at least 32.
_SQUEEZE_SHARE = 1 / 16
_SQUEEZE_MIN = 32


class ResNetLayout(NamedTuple):
    """The blocks and groups of one residual network."""

    bottleneck: bool
    blocks: tuple[int, int, int, int]
    groups: int = 1
    group_width: int = 64


LAYOUTS = {
    "resnet18": ResNetLayout(False, (2, 2, 2, 2)),
    "resnet34": ResNetLayout(False, (3, 4, 6, 3)),
    "resnet50": ResNetLayout(True, (3, 4, 6, 3)),
    "resnet101": ResNetLayout(True, (3, 4, 23, 3)),
    "resnet152": ResNetLayout(True, (3, 8, 36, 3)),
    "resnext50_32x4d": ResNetLayout(True, (3, 4, 6, 3), groups=32, group_width=4),
    "wide_resnet50_2": ResNetLayout(True, (3, 4, 6, 3), group_width=128),
    "wide_resnet101_2": ResNetLayout(True, (3, 4, 23, 3), group_width=128),
}


class ChannelAffine(nn.Module):
    """A scale and a shift for each channel in place of a norm, without statistics."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        return maps * self.weight[:, None, None] + self.bias[:, None, None]


def norm_builder(name: NormName) -> Norm:
    """Return a function that builds a norm for a number of channels."""
    norms: dict[NormName, Norm] = {
        "batch": nn.BatchNorm2d,
        # 32 groups (Wu and He 2018, arXiv:1803.08494v3), fewer if 32 does not divide the channels.
        "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
        "none": ChannelAffine,
    }
    return norms[name]


class SelectiveKernel(nn.Module):
    """Two 3 x 3 convolutions, mixed per channel with weights computed from the image.

    Source: Li et al. 2019, arXiv:1903.06586v2, in the form of the SimCLR v2 authors' resnet.py.
    Departs: from Li et al., as those authors do: both kernels are 3 x 3 and not grouped.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        hidden = max(int(channels * _SQUEEZE_SHARE), _SQUEEZE_MIN)
        self.conv = _conv(in_channels, 2 * channels, 3, stride=stride)
        self.bn = norm(2 * channels)
        self.squeeze = _conv(channels, hidden, 1)
        # A group of one channel and one pixel would normalise to zero.
        grouped = isinstance(self.bn, nn.GroupNorm)
        self.squeeze_bn = nn.GroupNorm(1, hidden) if grouped else norm(hidden)
        self.mix = _conv(hidden, 2 * channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H', W')``, >= 0."""
        first, second = F.relu(self.bn(self.conv(maps))).chunk(2, dim=1)
        pooled = (first + second).mean(dim=(2, 3), keepdim=True)
        hidden = F.relu(self.squeeze_bn(self.squeeze(pooled)))
        for_first, for_second = self.mix(hidden).chunk(2, dim=1)
        share: Tensor = torch.sigmoid(for_first - for_second)  # the softmax of the two
        return share * first + (1 - share) * second


class ShortcutPool(nn.Module):
    """The mean of 2 x 2 pixels, at stride 1 or 2.

    Source: ResNet-D (He et al. 2018, arXiv:1812.01187v2), in the form of the SimCLR v2 authors'
    resnet.py, which pools at stride 1 too. Departs: for odd sides, they count zeros.

    Args:
        stride: 1 or 2.
        edge: inside: ignore pixels beyond the edge. zeros: count them as zeros, as in
            Separius/SimCLRv2-Pytorch, at stride 1 and for odd sides.
    """

    def __init__(self, stride: int, *, edge: ShortcutEdge = "inside") -> None:
        super().__init__()
        self.stride = stride
        self.edge = edge

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``."""
        if self.edge == "zeros":
            return F.avg_pool2d(F.pad(maps, (0, 1, 0, 1)), 2, stride=self.stride)
        if self.stride == 1:
            padded = F.avg_pool2d(maps, 2, stride=1, padding=1, count_include_pad=False)
            return padded[:, :, 1:, 1:]
        return F.avg_pool2d(maps, 2, stride=self.stride, ceil_mode=True, count_include_pad=False)


class _Style(NamedTuple):
    """The options that all blocks of a network share."""

    norm: Norm
    selective_kernels: bool
    groups: int
    group_width: int
    shortcut_edge: ShortcutEdge

    def kernel(self, in_channels: int, channels: int, stride: int) -> tuple[nn.Module, nn.Module]:
        """Return a 3 x 3 convolution and its norm; selective kernels contain their norm."""
        if self.selective_kernels:
            selective = SelectiveKernel(in_channels, channels, stride=stride, norm=self.norm)
            return selective, nn.Identity()
        conv = _conv(in_channels, channels, 3, stride=stride, groups=self.groups)
        return conv, self.norm(channels)

    def shortcut(self, in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
        """Return the layers that match the input's shape to the output's; None if they agree."""
        if stride == 1 and in_channels == channels:
            return None
        if self.selective_kernels:
            pool = ShortcutPool(stride, edge=self.shortcut_edge)
            conv = _conv(in_channels, channels, 1)
            return nn.Sequential(pool, conv, self.norm(channels))
        conv = _conv(in_channels, channels, 1, stride=stride)
        return nn.Sequential(conv, self.norm(channels))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions; the first one has the stride and the selective kernels."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, style: _Style) -> None:
        super().__init__()
        self.conv1, self.bn1 = style.kernel(in_channels, channels, stride)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = style.norm(channels)
        self.downsample = style.shortcut(in_channels, channels, stride)

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H', W')``."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        maps = F.relu(self.bn1(self.conv1(maps)), inplace=True)
        return F.relu(self.bn2(self.conv2(maps)).add_(shortcut), inplace=True)


class Bottleneck(nn.Module):
    """A 3 x 3 convolution, or selective kernels, between two of 1 x 1."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, style: _Style) -> None:
        super().__init__()
        inner = channels * style.group_width // 64 * style.groups
        out_channels = channels * self.expansion
        self.conv1 = _conv(in_channels, inner, 1)
        self.bn1 = style.norm(inner)
        self.conv2, self.bn2 = style.kernel(inner, inner, stride)
        self.conv3 = _conv(inner, out_channels, 1)
        self.bn3 = style.norm(out_channels)
        self.downsample = style.shortcut(in_channels, out_channels, stride)

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, 4 channels, H', W')``."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        maps = F.relu(self.bn1(self.conv1(maps)), inplace=True)
        maps = F.relu(self.bn2(self.conv2(maps)), inplace=True)
        return F.relu(self.bn3(self.conv3(maps)).add_(shortcut), inplace=True)


class ResNet(nn.Module):
    """A residual network without its classifier.

    With width 1, batch norm and no selective kernels, its state dict is that of torchvision's
    network of the same name without ``fc``, and its features agree.

    Args:
        layout: The blocks and groups of the network.
        stem: imagenet: 7 x 7 of stride 2, then max-pool (with selective kernels three of 3 x 3 and
            max-pool, ResNet-D). cifar: 3 x 3 of stride 1. cifar_padded: the same, with two pixels
            of zeros around the image instead of one. small: 3 x 3 of stride 2.
        width: Factor on all channels, which are rounded to a multiple of 8.
        selective_kernels: Use them in every block (in basic blocks as the first convolution, as in
            timm).
        shortcut_edge: How the pools of selective kernels' shortcuts treat the edge.
        norm: batch, group, or none: a learnt scale and shift for each channel.
        zero_init_residual: Start each residual branch at zero.
    """

    def __init__(
        self,
        layout: ResNetLayout,
        *,
        stem: Stem = "imagenet",
        width: float = 1.0,
        selective_kernels: bool = False,
        shortcut_edge: ShortcutEdge = "inside",
        norm: NormName = "batch",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        style = _Style(
            norm_builder(norm), selective_kernels, layout.groups, layout.group_width, shortcut_edge
        )
        self.stem = stem
        self.shortcut_edge = shortcut_edge
        block = Bottleneck if layout.bottleneck else BasicBlock
        channels = max(round(64 * width / 8), 1) * 8
        self.embed_dim = 8 * channels * block.expansion
        self.conv1 = _stem_conv(stem, channels, style)
        self.bn1 = style.norm(channels)
        pool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.maxpool = pool
        group = partial(_group, block, style)
        out = channels * block.expansion
        self.layer1 = group(channels, channels, layout.blocks[0], 1)
        self.layer2 = group(out, 2 * channels, layout.blocks[1], 2)
        self.layer3 = group(2 * out, 4 * channels, layout.blocks[2], 2)
        self.layer4 = group(4 * out, 8 * channels, layout.blocks[3], 2)
        self._init_weights(zero_init_residual)

    def _init_weights(self, zero_init_residual: bool) -> None:
        """Draw convolutions from He's normal, as torchvision does; norms start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.get_parameter("weight"))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` float, normalised, to ``(N, D)``."""
        maps = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return F.adaptive_avg_pool2d(maps, 1).flatten(1)


def _conv(
    in_channels: int,
    channels: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    extra_padding: int = 0,
) -> Conv2d:
    """Return a convolution that keeps the resolution up to its stride, without bias."""
    padding = size // 2 + extra_padding
    return Conv2d(
        in_channels, channels, size, stride=stride, padding=padding, groups=groups, bias=False
    )


def _stem_conv(stem: Stem, channels: int, style: _Style) -> nn.Module:
    if stem != "imagenet":
        return _conv(
            3, channels, 3, stride=2 if stem == "small" else 1, extra_padding=stem == "cifar_padded"
        )
    if not style.selective_kernels:
        return _conv(3, channels, 7, stride=2)
    half = channels // 2
    return nn.Sequential(
        _conv(3, half, 3, stride=2),
        style.norm(half),
        nn.ReLU(inplace=True),
        _conv(half, half, 3),
        style.norm(half),
        nn.ReLU(inplace=True),
        _conv(half, channels, 3),
    )


def _group(
    block: type[BasicBlock | Bottleneck],
    style: _Style,
    in_channels: int,
    channels: int,
    num_blocks: int,
    stride: int,
) -> nn.Sequential:
    """Return the blocks of one resolution; the first one has the stride."""
    first = block(in_channels, channels, stride=stride, style=style)
    inner = channels * block.expansion
    rest = (block(inner, channels, stride=1, style=style) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *rest)
