"""Supervised training and distillation on two gloo processes equal one process.

In float64 and with batch norm over all ranks. Of the labels, rank 0 knows three and rank 1 one, so
that a mean of the ranks' means would be wrong.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import Results, mine

from raysl.methods import load_method
from raysl.methods.base import Batch, Progress, TrainingSet
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.classifier import Classifier, save_classifier
from raysl.nn.collectives import mean_over_ranks, rank_and_size

pytestmark = pytest.mark.distributed

IMAGES, SIZE_PX = 8, 32
NAMES = ("ant", "bee", "cat")
DATA = TrainingSet(64, IMAGES, (SIZE_PX,), class_counts=(3, 3, 2), class_names=NAMES)
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
SOME = torch.tensor([0, 1, 2, -1, -1, 2, -1, -1])
CASES: dict[str, dict[str, Any]] = {
    "supervised": {"name": "supervised", "label_smoothing": 0.1},
    "unlabelled": {"name": "distill", "temperature": 0.5},
    "pseudo-labels": {"name": "distill", "targets": "hard"},
    "with labels": {"name": "distill", "distillation_weight": 0.4},
}


def images() -> Tensor:
    shape, generator = (IMAGES, 3, SIZE_PX, SIZE_PX), torch.Generator().manual_seed(1)
    rows = torch.linspace(0.3, 2.5, IMAGES).view(-1, 1, 1, 1)
    return mine((torch.randn(*shape, generator=generator) * rows + rows).double())


def teacher(folder: str) -> str:
    config = BackboneConfig(name="resnet18", stem="small", width=0.125)
    torch.manual_seed(7)
    model = Classifier(build_backbone(config), nn.Sequential(), NAMES)
    nn.init.normal_(model.linear.weight)
    path = Path(folder) / "classifier.safetensors"
    about = {"backbone": config.model_dump(mode="json"), "image_size_px": SIZE_PX}
    save_classifier(path, model, description=about)
    return str(path)


def train_step(settings: dict[str, Any], folder: str) -> Results:
    kind = load_method(settings["name"])
    given = {"teacher": teacher(folder)} if settings["name"] == "distill" else {}
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    method = kind(kind.Config(**settings, **given), Backbone(net, embed_dim=8), DATA)
    set_batch_norm_scope(method, "sync")
    method.double()
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    labels = LABELS if settings["name"] == "supervised" else SOME
    batch = Batch([images()], mine(torch.arange(IMAGES)), mine(labels))
    loss = model(batch, Progress(step=0, total_steps=10, steps_per_epoch=5, seed=1)).loss
    loss.backward()
    return {
        "mine": loss.detach(),
        "loss": mean_over_ranks(loss.detach()),
        "gradients": [p.grad for p in method.parameters()],
    }


def everything() -> Results:
    with tempfile.TemporaryDirectory() as folder:
        return {case: train_step(settings, folder) for case, settings in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_loss_and_gradient_of_one_big_batch(
    ranks: list[Results], alone: Results, case: str
) -> None:
    expected = alone[case]
    scale = max(float(gradient.abs().max()) for gradient in expected["gradients"])
    assert ranks[0][case]["mine"] != ranks[1][case]["mine"]
    for found in (rank[case] for rank in ranks):
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-10, atol=0.0)
        for gradient, whole in zip(found["gradients"], expected["gradients"], strict=True):
            torch.testing.assert_close(gradient, whole, rtol=0.0, atol=1e-10 * scale)
