from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from raysl.nn.resnet import LAYOUTS, ResNet, SelectiveKernel, ShortcutPool, norm_builder


def build(name: str = "resnet18", **options: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(LAYOUTS[name], **options)


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def shape_after_stem(net: ResNet, given: Tensor) -> tuple[int, ...]:
    shapes: list[tuple[int, ...]] = []
    net.layer1.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    with torch.no_grad():
        net.eval()(given)
    return tuple(shapes[0])


class TestAgainstTorchvision:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_names_and_shapes_are_the_same_and_in_order(self, name: str) -> None:
        with torch.device("meta"):
            ours = build(name)
            theirs = getattr(torchvision.models, name)()
        theirs.fc = nn.Identity()
        shapes = [(key, value.shape) for key, value in ours.state_dict().items()]
        assert shapes == [(key, value.shape) for key, value in theirs.state_dict().items()]

    @pytest.mark.parametrize(
        ("name", "training"), [("resnet18", True), ("resnet18", False), ("resnext50_32x4d", False)]
    )
    def test_features_are_the_same(self, name: str, training: bool) -> None:
        ours = build(name)
        theirs = getattr(torchvision.models, name)()
        theirs.fc = nn.Identity()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        # In double precision: batch norm of two images of one pixel makes much of a last digit.
        given = images().double()
        with torch.no_grad():
            features = ours.double().train(training)(given)
            torch.testing.assert_close(features, theirs.double().train(training)(given))

    def test_group_norm_is_as_torchvision_would_place_it(self) -> None:
        ours = build(norm="group").eval()
        theirs = torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(32, c))
        theirs.fc = nn.Identity()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(ours(images()), theirs.eval()(images()))


# arXiv:2006.10029v2, table 1, in millions.
@pytest.mark.parametrize(
    ("name", "width", "selective", "millions"),
    [
        ("resnet50", 1, False, 24),
        ("resnet50", 1, True, 35),
        ("resnet50", 2, False, 94),
        ("resnet50", 2, True, 140),
        ("resnet101", 1, True, 65),
        ("resnet152", 3, True, 795),
    ],
)
def test_parameters_are_as_many_as_simclr_v2_publishes(
    name: str, width: int, selective: bool, millions: int
) -> None:
    with torch.device("meta"):
        net = build(name, width=width, selective_kernels=selective)
    count = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=1)
    assert net.embed_dim == 2048 * width


class TestStem:
    @pytest.mark.parametrize("selective", [False, True])
    @pytest.mark.parametrize(
        ("stem", "side"), [("imagenet", 8), ("cifar", 32), ("cifar_padded", 34), ("small", 16)]
    )
    def test_resolution(self, stem: Any, side: int, selective: bool) -> None:
        net = build(stem=stem, selective_kernels=selective)
        assert shape_after_stem(net, images(1)) == (1, 64, side, side)

    def test_with_selective_kernels_has_three_convolutions(self) -> None:
        with torch.device("meta"):
            stem = build("resnet50", selective_kernels=True, width=2).conv1
        shapes = [tuple(m.weight.shape) for m in stem.modules() if isinstance(m, nn.Conv2d)]
        assert shapes == [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3)]

    def test_has_the_spread_of_he_initialisation(self) -> None:
        weight = build(stem="cifar").conv1.weight
        assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


class TestWidth:
    @pytest.mark.parametrize(("width", "channels"), [(0.5, 32), (1, 64), (0.3, 16), (0.01, 8)])
    def test_scales_all_channels_in_multiples_of_eight(self, width: float, channels: int) -> None:
        with torch.device("meta"):
            net, deep = build(width=width), build("resnet50", width=width)
        assert (net.embed_dim, deep.embed_dim) == (8 * channels, 32 * channels)
        for convolution in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
            assert convolution.out_channels % channels == 0


class TestSelectiveKernel:
    def test_mixes_two_convolutions_by_a_softmax_over_them(self) -> None:
        torch.manual_seed(0)
        kernel = SelectiveKernel(4, 6, stride=2, norm=norm_builder("batch"))
        maps = torch.randn(3, 4, 8, 8)
        branches = F.relu(kernel.bn(kernel.conv(maps))).view(3, 2, 6, 4, 4)
        pooled = branches.sum(1).mean((2, 3)).view(3, 6, 1, 1)
        logits = kernel.mix(F.relu(kernel.squeeze_bn(kernel.squeeze(pooled))))
        weights = logits.view(3, 2, 6, 1, 1).softmax(dim=1)
        torch.testing.assert_close(kernel(maps), (branches * weights).sum(1))

    @pytest.mark.parametrize(("channels", "hidden"), [(64, 32), (1024, 64)])
    def test_weighs_through_a_sixteenth_of_the_channels_but_at_least_32(
        self, channels: int, hidden: int
    ) -> None:
        with torch.device("meta"):
            kernel = SelectiveKernel(8, channels, stride=1, norm=norm_builder("batch"))
        assert kernel.squeeze.out_channels == hidden


class TestShortcutPool:
    def test_of_stride_two_is_the_mean_of_four_or_of_what_is_there(self) -> None:
        maps = torch.arange(9.0).view(1, 1, 3, 3)
        expected = torch.tensor([[2.0, 3.5], [6.5, 8.0]])
        assert torch.equal(ShortcutPool(2)(maps)[0, 0], expected)
        assert torch.equal(ShortcutPool(2)(maps[..., :1, :1]), maps[..., :1, :1])

    def test_of_stride_one_looks_right_and_down(self) -> None:
        maps = torch.arange(4.0).view(1, 1, 2, 2)
        expected = torch.tensor([[1.5, 2.0], [2.5, 3.0]])
        assert torch.equal(ShortcutPool(1)(maps)[0, 0], expected)

    def test_that_counts_zeros_takes_them_for_what_lies_beyond_the_edge(self) -> None:
        maps = torch.arange(9.0).view(1, 1, 3, 3)
        expected = torch.tensor([[2.0, 1.75], [3.25, 2.0]])
        assert torch.equal(ShortcutPool(2, edge="zeros")(maps)[0, 0], expected)
        expected = torch.tensor([[1.5, 1.0], [1.25, 0.75]])
        maps = torch.arange(4.0).view(1, 1, 2, 2)
        assert torch.equal(ShortcutPool(1, edge="zeros")(maps)[0, 0], expected)
        assert torch.equal(
            ShortcutPool(2, edge="zeros")(images(1)), ShortcutPool(2)(images(1))
        )  # of even sides


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("zero", [True, False])
def test_residual_branches_start_at_zero_only_if_asked(norm: Any, zero: bool) -> None:
    net = build(norm=norm, zero_init_residual=zero)
    scales = [m.bn2.weight for m in net.modules() if hasattr(m, "bn2")]
    assert len(scales) == 8
    assert all(float(scale.detach().abs().sum()) == (0 if zero else len(scale)) for scale in scales)


@pytest.mark.parametrize(
    ("name", "selective"), [("resnet18", False), ("resnet18", True), ("resnet50", True)]
)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_every_parameter_gets_a_gradient(name: str, selective: bool, norm: Any) -> None:
    net = build(name, norm=norm, selective_kernels=selective, width=0.25, stem="small")
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = net(images(4))
    (features * torch.linspace(-1, 1, net.embed_dim)).sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("norm", ["group", "none"])
def test_without_batch_norm_an_image_does_not_change_another(norm: Any) -> None:
    net = build(norm=norm, width=0.25, stem="small")
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    torch.testing.assert_close(net(images())[:1], net(images()[:1]))
