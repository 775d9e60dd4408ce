"""SimCLR v2 as convert.py of Separius/SimCLRv2-Pytorch writes it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysl.encoder.file import load_encoder, load_weights
from raysl.errors import DataError
from raysl.exchange.import_encoder import ImportConfig, import_encoder
from raysl.nn.backbones import BackboneConfig, build_backbone

BLOCKS = (3, 4, 6, 3)


def conv(inner: int, outer: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, size, stride, (size - 1) // 2, bias=False)


def norm(channels: int, *, relu: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU() if relu else nn.Identity())


class Selective(nn.Module):
    """Two kernels, mixed by a softmax of what their sum's mean says."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        hidden = max(outer // 16, 32)
        self.main_conv = nn.Sequential(conv(inner, 2 * outer, 3, stride), norm(2 * outer))
        self.mixing_conv = nn.Sequential(
            conv(outer, hidden, 1), norm(hidden), conv(hidden, 2 * outer, 1)
        )

    def forward(self, maps: Tensor) -> Tensor:
        n, double, height, width = (both := self.main_conv(maps)).shape
        both = both.view(n, 2, double // 2, height, width)
        pooled = both.sum(1).mean((2, 3), keepdim=True)
        shares = self.mixing_conv(pooled).view(n, 2, double // 2, 1, 1).softmax(1)
        return (both * shares).sum(1)


class Projection(nn.Module):
    """The way around: with selective kernels a pool whose far edge is padded with zeros."""

    def __init__(self, inner: int, outer: int, stride: int, *, selective: bool) -> None:
        super().__init__()
        self.shortcut: nn.Module = conv(inner, outer, 1, stride)
        if selective:
            pool = nn.AvgPool2d(2, stride)
            self.shortcut = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), pool, conv(inner, outer, 1))
        self.bn = norm(outer, relu=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.bn(self.shortcut(maps))


class Block(nn.Module):
    def __init__(
        self, inner: int, outer: int, stride: int, *, selective: bool, first: bool
    ) -> None:
        super().__init__()
        self.projection: nn.Module = nn.Identity()
        if first:
            self.projection = Projection(inner, 4 * outer, stride, selective=selective)
        middle = [Selective(outer, outer, stride)]
        if not selective:
            middle = [conv(outer, outer, 3, stride), norm(outer)]
        ends = [conv(outer, 4 * outer, 1), norm(4 * outer, relu=False)]
        self.net = nn.Sequential(conv(inner, outer, 1), norm(outer), *middle, *ends)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.projection(maps) + self.net(maps))


class Group(nn.Module):
    def __init__(self, count: int, inner: int, outer: int, stride: int, *, selective: bool) -> None:
        super().__init__()
        first = Block(inner, outer, stride, selective=selective, first=True)
        rest = [
            Block(4 * outer, outer, 1, selective=selective, first=False) for _ in range(count - 1)
        ]
        self.blocks = nn.ModuleList([first, *rest])

    def forward(self, maps: Tensor) -> Tensor:
        for block in self.blocks:
            maps = block(maps)
        return maps


class PortedResNet(nn.Module):
    """ResNet-50 of some width, in channels of the first stage."""

    def __init__(self, channels: int, *, selective: bool) -> None:
        super().__init__()
        half, inner = channels // 2, channels
        stem = [conv(3, channels, 7, 2)]
        if selective:
            deep = [conv(3, half, 3, 2), norm(half), conv(half, half, 3), norm(half)]
            stem = [*deep, conv(half, channels, 3)]
        groups = []
        for stage, count in enumerate(BLOCKS):
            outer = channels * 2**stage
            groups.append(Group(count, inner, outer, 1 + (stage > 0), selective=selective))
            inner = 4 * outer
        pooled = nn.Sequential(*stem, norm(channels), nn.MaxPool2d(3, 2, 1))
        self.net = nn.Sequential(pooled, *groups)
        self.fc = nn.Linear(inner, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).mean((2, 3))


def ported(*, selective: bool) -> PortedResNet:
    torch.manual_seed(0)
    net = PortedResNet(16, selective=selective)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return net.eval()


def saved(net: PortedResNet, folder: Path) -> Path:
    head = {"layers.0.weight": torch.ones(3, 3)}
    torch.save({"resnet": net.state_dict(), "head": head}, folder / "r50_1x_sk1.pth")
    return folder / "r50_1x_sk1.pth"


@pytest.mark.parametrize("size", [64, 70])
@pytest.mark.parametrize("selective", [True, False])
@torch.no_grad()
def test_features_are_those_of_the_port(tmp_path: Path, *, selective: bool, size: int) -> None:
    net = ported(selective=selective)
    path, output = saved(net, tmp_path), tmp_path / "e.safetensors"
    imported = import_encoder(path, ImportConfig(), output, layout="auto")
    images = torch.rand(2, 3, size, size).double()
    expected = net.double()(images)
    found = load_encoder(output).double()(images)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    told = imported.backbone.model_dump(exclude_defaults=True)
    edge = {"selective_kernels": True, "shortcut_edge": "zeros"} if selective else {}
    assert told == {"width": 0.25} | edge
    assert (imported.layout, imported.mean, imported.std) == ("simclr_v2", (0,) * 3, (1,) * 3)
    assert imported.taken == "the network (resnet/)"


def test_a_run_does_not_start_from_it_with_another_edge(tmp_path: Path) -> None:
    path = saved(ported(selective=True), tmp_path)
    config = BackboneConfig(name="resnet50", width=0.25, selective_kernels=True)
    with pytest.raises(DataError, match=r"zeros beyond the edge .*set backbone\.shortcut_edge=zer"):
        load_weights(build_backbone(config), path)
