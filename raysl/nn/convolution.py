"""Compute in other ways those convolutions on CPU that oneDNN does slowly or wrongly.

The last stages of a ResNet on 32 px images work on maps of 4 x 4 and 2 x 2 pixels with hundreds of
channels. oneDNN, which torch calls, loops over their pixels and leaves most of a core unused: the
weights' gradient of 512 channels on 2 x 2 pixels takes 111 ms, nine matrix products take 3 ms (256
images, bfloat16 with AMX; docs/results.md). On small maps, convolutions are therefore products.

The weights' gradient of a 1 x 1 convolution with a stride writes past its workspace if there are
fewer input channels than a vector register has numbers, and maps are channels last (oneDNN issue
6035; seen with 3.13.3 in torch 2.15.0, AVX-512). Without a stride it does not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

# Largest side of an output map for which products were faster, for 64 to 512 channels.
FORWARD_SIDE_PX = 2
BACKWARD_SIDE_PX = {torch.bfloat16: 4, torch.float32: 2, torch.float64: 2}
_VECTOR_CHANNELS = 16  # of AVX-512, the widest


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with the same parameters and, up to the order of sums, the same results."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C', H', W')``."""
        if maps.device.type != "cpu":
            return super().forward(maps)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            maps, weight = maps.to(dtype), weight.to(dtype)
        if self._skips_pixels_of_few_channels() and torch.is_grad_enabled():
            vertical, horizontal = self.stride
            maps = maps[:, :, ::vertical, ::horizontal]
            return F.conv2d(maps, weight, self.bias)
        if not self._is_small(maps):
            return super().forward(maps)
        result: Tensor = _SmallConvolution.apply(maps, weight, self.stride[0], self.padding[0])
        return result

    def _skips_pixels_of_few_channels(self) -> bool:
        """Return whether oneDNN's weight gradient of this convolution may be wrong."""
        is_pointwise = self.kernel_size == (1, 1) and self.padding == (0, 0) and self.groups == 1
        return is_pointwise and max(self.stride) > 1 and self.in_channels < _VECTOR_CHANNELS

    def _is_small(self, maps: Tensor) -> bool:
        """Return whether this is a plain square convolution whose output map is small."""
        limit = BACKWARD_SIDE_PX.get(maps.dtype, 0)
        side, size = max(maps.shape[-2:]), self.kernel_size[0]
        if side > limit * self.stride[0] or size == 1:
            return False
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False  # an exported graph needs a single convolution
        is_plain = self.groups == 1 and self.bias is None and self.dilation == (1, 1)
        is_square = self.kernel_size == (size, size) and self.stride == _pair(self.stride[0])
        return is_plain and is_square and self.padding == _pair(self.padding[0])


class _SmallConvolution(torch.autograd.Function):
    """The convolution and its two gradients; maps are channels last in memory."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.padding = stride, padding
        return _convolve(maps, weight, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        maps, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        maps_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            maps_gradient = _maps_gradient(grad, maps, weight, stride, padding)
        if ctx.needs_input_grad[1]:
            weight_gradient = _weight_gradient(grad, maps, weight.shape[-1], stride, padding)
        return maps_gradient, weight_gradient, None, None


def _convolve(maps: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Multiply the weights with all patches at once, if the output map is small enough."""
    size = weight.shape[-1]
    height, width = (((side + 2 * padding - size) // stride) + 1 for side in maps.shape[-2:])
    if max(height, width) > FORWARD_SIDE_PX:
        return F.conv2d(maps, weight, stride=stride, padding=padding)
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    patches = padded.unfold(1, size, stride).unfold(2, size, stride)  # (N, H', W', C, K, K)
    rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, size * size * maps.shape[1])
    result = rows @ weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).T
    return result.view(len(maps), height, width, -1).permute(0, 3, 1, 2)


def _maps_gradient(grad: Tensor, maps: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Return the gradient of the maps: at stride 1, a convolution with the rotated weights."""
    full_padding = weight.shape[-1] - 1 - padding
    if stride == 1 and full_padding >= 0:
        return _convolve(grad, weight.flip(2, 3).transpose(0, 1), 1, full_padding)
    gradients = torch.ops.aten.convolution_backward(
        grad, maps, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1,
        [True, False, False],
    )  # fmt: skip
    result: Tensor = gradients[0]
    return result


def _weight_gradient(grad: Tensor, maps: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Return the gradient of the weights: one product per kernel weight, over its pixels."""
    inputs, outputs = maps.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    channels, out_channels = inputs.shape[-1], outputs.shape[-1]
    products = []
    for top in range(size):
        of_grad_y, of_maps_y = _overlap(top - padding, maps.shape[2], grad.shape[2], stride)
        for left in range(size):
            of_grad_x, of_maps_x = _overlap(left - padding, maps.shape[3], grad.shape[3], stride)
            rows = outputs[:, of_grad_y, of_grad_x].reshape(-1, out_channels)
            columns = inputs[:, of_maps_y, of_maps_x].reshape(-1, channels)
            products.append(rows.T @ columns)
    return torch.stack(products).view(size, size, out_channels, channels).permute(2, 3, 0, 1)


def _overlap(offset: int, in_side: int, out_side: int, stride: int) -> tuple[slice, slice]:
    """Return the outputs whose input at ``offset`` lies inside the map, and those inputs."""
    first = max(0, -(offset // stride))
    last = min(out_side - 1, (in_side - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    start = first * stride + offset
    return slice(first, last + 1), slice(start, last * stride + offset + 1, stride)
