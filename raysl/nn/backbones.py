"""Encoders: torchvision's residual networks, with ImageNet's stem or one for small images."""

import importlib
from typing import Any, Literal

from torch import Tensor, nn

from raysl.config.base import Config
from raysl.nn.batchnorm import BatchNormScope

ResNetName = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


class BackboneConfig(Config):
    """The encoder that is pretrained."""

    name: ResNetName = "resnet50"
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """imagenet: 7 x 7 convolution of stride 2, then max-pool, as in torchvision. cifar: 3 x 3 of
    stride 1, no max-pool (SimCLR, appendix B.9), for images of 32 px or so; 10 to 16 times the
    work on the same image."""
    zero_init_residual: bool = False
    """Start each residual branch at zero (Goyal et al. 2017, arXiv:1706.02677v2, sec. 5.1)."""
    batch_norm: BatchNormScope = "worker"
    """Images that batch norm takes its statistics from while training: those of this worker, of
    all workers (sync), or of each of batch_norm_splits parts of this worker's batch (split)."""
    batch_norm_splits: int = 8
    """Parts for batch_norm: split."""


class Backbone(nn.Module):
    """An encoder without its classifier: images to features.

    ``net`` is the torchvision module with ``fc`` replaced by the identity, so its state dict loads
    into torchvision's own class.
    """

    def __init__(self, net: nn.Module, *, embed_dim: int) -> None:
        super().__init__()
        self.net = net
        self.embed_dim = embed_dim

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` float, normalised, to ``(N, embed_dim)``."""
        return self.net(images)  # type: ignore[no-any-return]


def build_backbone(
    name: str, *, stem: str = "imagenet", zero_init_residual: bool = False
) -> Backbone:
    """Build an encoder with random weights from the global generator."""
    options: dict[str, Any] = {"zero_init_residual": zero_init_residual}
    # Late: torchvision loads torch's compiler, and a driver, which builds nothing, can do without.
    models = importlib.import_module("torchvision.models")
    net: Any = getattr(models, name)(weights=None, **options)
    embed_dim = int(net.fc.in_features)
    net.fc = nn.Identity()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return Backbone(net, embed_dim=embed_dim)
