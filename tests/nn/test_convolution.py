"""The convolution of small maps is torch's, in value, gradient and second gradient."""

import itertools
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from raysl.nn import convolution
from raysl.nn.convolution import Conv2d

# Output side, kernel, stride, padding: below, at and above what is small.
SHAPES = [
    (side, kernel, stride, padding)
    for side, (kernel, stride, padding) in itertools.product(
        (1, 2, 3, 4, 5, 8), ((3, 1, 1), (3, 2, 1), (1, 2, 0), (5, 1, 2), (3, 1, 0))
    )
    if side + 2 * padding >= kernel
]


def pair_of(kernel: int, stride: int, padding: int) -> tuple[Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    ours = Conv2d(6, 10, kernel, stride=stride, padding=padding, bias=False)
    theirs = nn.Conv2d(6, 10, kernel, stride=stride, padding=padding, bias=False)
    theirs.load_state_dict(ours.state_dict())
    return ours.double(), theirs.double()


def run(net: nn.Module, maps: Tensor) -> tuple[Tensor, ...]:
    maps = maps.clone().requires_grad_()
    out = net(maps)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    weight = next(net.parameters())
    assert maps.grad is not None
    assert weight.grad is not None
    return out.detach(), maps.grad, weight.grad


@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_torch(
    side: int, kernel: int, stride: int, padding: int, layout: torch.memory_format
) -> None:
    ours, theirs = pair_of(kernel, stride, padding)
    maps = torch.randn(3, 6, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    for mine, reference in zip(run(ours, maps), run(theirs, maps), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def test_equals_torch_on_maps_that_are_not_square() -> None:
    ours, theirs = pair_of(3, 2, 1)
    maps = torch.randn(3, 6, 1, 4, dtype=torch.float64)
    for mine, reference in zip(run(ours, maps), run(theirs, maps), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("stride", "side"), [(1, 2), (2, 4)])
def test_gradient_and_second_gradient_are_right(stride: int, side: int) -> None:
    net = Conv2d(2, 3, 3, stride=stride, padding=1, bias=False).double()
    maps = torch.randn(2, 2, side, side, dtype=torch.float64, requires_grad=True)
    with patch.object(convolution, "_weight_gradient", wraps=convolution._weight_gradient) as small:
        assert torch.autograd.gradcheck(net, (maps,))
        assert torch.autograd.gradgradcheck(net, (maps,))
        net(maps).sum().backward()
    assert small.called  # it is ours that was checked


def test_autocast_computes_in_bfloat16_and_returns_gradients_of_the_parameters_type() -> None:
    ours = Conv2d(16, 16, 3, padding=1, bias=False)
    theirs = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(8, 16, 4, 4)
    results = []
    for net in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(maps)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        assert net.weight.grad is not None
        assert net.weight.grad.dtype == torch.float32
        results.append((out.detach().float(), net.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"groups": 2}, {"bias": True}, {"dilation": 2, "padding": 2}, {"kernel_size": 1}]
)
def test_leaves_what_it_does_not_know_to_torch(settings: dict[str, int]) -> None:
    given = {"kernel_size": 3, "padding": 1, "bias": False} | settings
    if given["kernel_size"] == 1:
        given["padding"] = 0
    net = Conv2d(4, 4, **given)
    with patch.object(convolution._SmallConvolution, "apply") as small:
        assert net(torch.randn(2, 4, 2, 2)).shape == (2, 4, 2, 2)
    small.assert_not_called()


def test_traces_to_one_convolution() -> None:
    traced = torch.jit.trace(Conv2d(4, 4, 3, padding=1, bias=False).eval(), torch.randn(1, 4, 2, 2))
    assert "_convolution" in str(traced.inlined_graph)
    assert "unfold" not in str(traced.inlined_graph)


@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
@pytest.mark.parametrize("height", [7, 8])
def test_a_pointwise_convolution_of_few_channels_never_strides_over_maps(
    stride: int | tuple[int, int], height: int
) -> None:
    torch.manual_seed(0)
    ours = Conv2d(6, 10, 1, stride=stride).double()
    theirs = nn.Conv2d(6, 10, 1, stride=stride).double()
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(3, 6, height, 9, dtype=torch.float64).to(memory_format=torch.channels_last)
    expected = run(theirs, maps)
    with patch.object(convolution.F, "conv2d", wraps=convolution.F.conv2d) as conv2d:
        found = run(ours, maps)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    (call,) = conv2d.mock_calls
    assert call.args[0].shape == (3, 6, *found[0].shape[-2:])
    assert "stride" not in call.kwargs
    assert len(call.args) == 3


@pytest.mark.parametrize(("channels", "with_gradient"), [(16, True), (6, False)])
def test_other_pointwise_convolutions_are_torch_s(channels: int, with_gradient: bool) -> None:
    ours = Conv2d(channels, 4, 1, stride=2).double()
    maps = torch.randn(2, channels, 8, 8, dtype=torch.float64)
    with (
        torch.set_grad_enabled(with_gradient),
        patch.object(convolution.F, "conv2d", wraps=convolution.F.conv2d) as conv2d,
    ):
        ours(maps)
    (call,) = conv2d.mock_calls
    assert call.args[0] is maps
    assert call.args[3] == (2, 2)
