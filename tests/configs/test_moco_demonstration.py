"""MoCo on CIFAR-10 is the authors' moco_cifar10_demo.ipynb, asymmetric as that notebook stands."""

from pathlib import Path

import pytest

from raysl.augment.ops import Blur, ColorJitter, Flip, Grey
from raysl.methods.moco import MoCoConfig
from raysl.optim.build import peak_lr
from raysl.run.recipe import load_run

PATH = Path(__file__).parents[2] / "configs" / "moco_v2_resnet18_cifar10.yaml"
SYMMETRIC = ["method.symmetric=true", "optim.base_lr=0.12", "optim.weight_decay=2.5e-4"]


def test_has_the_notebooks_views() -> None:
    data = load_run(PATH).data
    (kind,) = data.views.views()
    assert (kind.count, kind.size_px) == (2, 32)
    assert kind.crop is not None
    assert kind.crop.scale == (0.08, 1.0)  # RandomResizedCrop(32)
    ops = {type(op): op for op in kind.ops}
    jitter = ops[ColorJitter]
    assert isinstance(jitter, ColorJitter)
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == (0.4, 0.4, 0.4)
    assert (jitter.hue, jitter.prob) == (0.1, 0.8)
    assert (ops[Grey].prob, ops[Flip].prob) == (0.2, 0.5)
    assert Blur not in ops
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.std == (0.2023, 0.1994, 0.2010)


def test_has_the_notebooks_network_and_loss() -> None:
    config = load_run(PATH)
    method, backbone = config.method, config.backbone
    assert isinstance(method, MoCoConfig)
    assert method.head == "linear"
    assert not method.symmetric
    assert (method.projection_dim, method.queue_length) == (128, 4096)
    assert (method.ema_momentum, method.temperature) == (0.99, 0.1)
    assert (backbone.name, backbone.stem) == ("resnet18", "cifar")
    assert (backbone.batch_norm, backbone.batch_norm_splits) == ("split", 8)
    assert not backbone.zero_init_residual


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [([], 1), (SYMMETRIC, 2)],  # the mean of both directions is half of the notebook's sum
    ids=["asymmetric, 82.6", "symmetric, 85.3"],
)
def test_has_the_notebooks_optimizer(overrides: list[str], factor: int) -> None:
    config = load_run(PATH, overrides)
    optim, train = config.optim, config.train
    assert (optim.name, optim.sgd_momentum, optim.nesterov) == ("sgd", 0.9, False)
    assert (train.epochs, train.global_batch_size) == (200, 512)
    assert peak_lr(optim, global_batch_size=512) / factor == pytest.approx(0.06)
    assert optim.weight_decay * factor == pytest.approx(5e-4)
    assert optim.decay_bias_and_norm
    assert (optim.schedule, optim.final_lr_ratio, optim.warmup.epochs) == ("cosine", 0.0, 0.0)
    assert getattr(config.method, "symmetric", None) == (factor == 2)


def test_its_header_names_the_overrides_of_the_symmetric_run() -> None:
    assert " ".join(SYMMETRIC) in " ".join(PATH.read_text().replace("#", " ").split())
