from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from raysl.methods.base import Progress, TrainingSet
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.nn.classifier import Classifier, save_classifier
from raysl.nn.vit import VisionTransformer

EMBED_DIM = 6


@pytest.fixture
def tiny_backbone() -> Callable[..., Backbone]:
    """A convolution, batch norm if asked, ReLU and the mean: enough to be a backbone."""

    def build(*, batch_norm: bool = True, seed: int = 0) -> Backbone:
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(3, EMBED_DIM, 3, bias=False)]
        if batch_norm:
            layers.append(nn.BatchNorm2d(EMBED_DIM))
        layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return Backbone(nn.Sequential(*layers), embed_dim=EMBED_DIM)

    return build


@pytest.fixture
def tiny_vit() -> Callable[..., Backbone]:
    """A vision transformer of two blocks for images of 32 px, with 16 patches."""

    def build(*, seed: int = 0, pool: Literal["cls", "mean"] = "cls") -> Backbone:
        torch.manual_seed(seed)
        net = VisionTransformer(
            image_size_px=32, patch_size_px=8, embed_dim=12, depth=2, num_heads=2, pool=pool
        )
        return Backbone(net, embed_dim=12)

    return build


@pytest.fixture
def training_set() -> TrainingSet:
    return TrainingSet(num_images=64, global_batch_size=8, view_sizes_px=(32, 32))


@pytest.fixture
def make_views() -> Callable[..., list[Tensor]]:
    """Views whose rows have different brightness and contrast, so that images differ."""

    def make(n: int = 8, *, num_views: int = 2, seed: int = 0, size: int = 8) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        spread = torch.linspace(0.5, 2.0, n).view(n, 1, 1, 1)
        return [
            torch.randn(n, 3, size, size, generator=generator) * spread + spread
            for _ in range(num_views)
        ]

    return make


@pytest.fixture
def progress() -> Progress:
    return Progress(step=3, total_steps=20, steps_per_epoch=5, seed=7)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small classifier of three classes, named by their numbers."""
    config = BackboneConfig(name="resnet18", stem="small", width=0.125)
    torch.manual_seed(1)
    model = Classifier(build_backbone(config), nn.Sequential(), ["0", "1", "2"])
    nn.init.normal_(model.linear.weight)  # surer of its opinion than a new one
    path = tmp_path_factory.mktemp("teacher") / "classifier.safetensors"
    about = {"backbone": config.model_dump(mode="json"), "image_size_px": 32}
    save_classifier(path, model, description=about)
    return path
