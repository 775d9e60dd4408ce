"""Supervised training and distillation on two gloo processes with half of the images, and on one.

In float64, with batch norm over all ranks; of the labels that distillation knows, one rank has
more than the other.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import RANKS, Results, mine

from raysl.methods import load_method
from raysl.methods.base import Batch, Method, Progress, TrainingSet
from raysl.methods.distill import known_label_loss
from raysl.nn.backbones import Backbone, BackboneConfig, build_backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.classifier import Classifier, save_classifier, save_head
from raysl.nn.collectives import mean_over_ranks, rank_and_size
from raysl.nn.heads import projection_mlp

pytestmark = pytest.mark.distributed

IMAGES = 8
STEPS = 3
CLASSES = ("cat", "dog", "cow")
DATA = TrainingSet(64, IMAGES, (16,), class_counts=(22, 21, 21), class_names=CLASSES)
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"label_smoothing": 0.1},
    "supervised_head": {"head_layers": 1},
    "supervised_frozen": {"head_layers": 1, "freeze_encoder": True},
    "distill": {"temperature": 0.5},
    "distill_labels": {"temperature": 0.5, "distillation_weight": 0.4},
    "distill_hard": {"targets": "hard", "distillation_weight": 0.4},
}
# Of each step. The first half lies on rank 0: three labels to one, all on one rank, none at all.
KNOWN = [
    [0, 2, -1, 1, -1, -1, 1, -1],
    [-1, -1, -1, -1, 2, 0, -1, 1],
    [-1] * IMAGES,
]


def numbers(*shape: int, seed: int) -> Tensor:
    """Rows that differ in mean and spread, so that each half has statistics of its own."""
    rows = torch.linspace(0.3, 2.5, shape[0]).view(-1, *[1] * (len(shape) - 1)).double()
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return noise * rows + rows


def build(name: str, folder: Path) -> Method:
    """Build a method, with a teacher or a pretrained head of this process's own writing."""
    torch.manual_seed(1)
    settings = dict(METHODS[name])
    if name.startswith("distill"):
        config = BackboneConfig(name="resnet18", stem="small", width=0.125)
        teacher = Classifier(build_backbone(config), nn.Sequential(), CLASSES)
        nn.init.normal_(teacher.linear.weight)
        about = {"backbone": config.model_dump(mode="json"), "image_size_px": 16}
        save_classifier(folder / "classifier.safetensors", teacher, description=about)
        settings["teacher"] = str(folder)
    elif settings.get("head_layers"):
        head = projection_mlp(8, 6, 4, num_layers=2)
        save_head(folder / "projection_head.safetensors", head, description={})
        settings["head"] = str(folder)
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    kind = load_method(name.partition("_")[0])
    method = kind(kind.Config(**settings), Backbone(net, embed_dim=8), DATA)
    classifier = method.label_classifier
    assert classifier is not None
    nn.init.normal_(classifier.linear.weight)  # at 0.01 the encoder hardly learns
    set_batch_norm_scope(method, "sync")
    return method.double()


def train_steps(name: str) -> Results:
    """Take steps, so that the last shows what the first did to the weights."""
    with TemporaryDirectory() as folder:
        method = build(name, Path(folder))
    model: nn.Module = method
    if rank_and_size()[1] > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05)
    found: Results = {"losses": [], "own_losses": [], "gradients": [], "metrics": []}
    for step in range(STEPS):
        images = mine(numbers(IMAGES, 3, 16, 16, seed=step))
        labels = torch.tensor(KNOWN[step]) if "distill" in name else torch.arange(IMAGES) % 3
        batch = Batch([images], mine(torch.arange(IMAGES)), mine(labels))
        optimizer.zero_grad()
        output = model(batch, Progress(step, STEPS, 2, seed=1))
        output.loss.backward()
        found["gradients"].append([p.grad.clone() for p in trainable])
        optimizer.step()
        found["own_losses"].append(output.loss.detach())
        found["losses"].append(mean_over_ranks(output.loss.detach()))
        found["metrics"].append({k: mean_over_ranks(v) for k, v in output.metrics.items()})
    found["state"] = method.state_dict()
    return found


def known_labels(labels: list[int]) -> Results:
    """The loss of this rank's labels and the gradient of its logits."""
    logits = mine(numbers(IMAGES, 3, seed=9)).requires_grad_()
    loss = known_label_loss(logits, mine(torch.tensor(labels)))
    loss.backward()
    return {"loss": loss.detach(), "gradient": logits.grad}


def everything() -> Results:
    return {
        "known": [known_labels(labels) for labels in KNOWN],
        "trained": {name: train_steps(name) for name in METHODS},
    }


class TestKnownLabelLoss:
    @pytest.mark.parametrize("number", range(len(KNOWN)))
    def test_mean_over_ranks_is_the_mean_over_all_known_labels_in_value_and_gradient(
        self, ranks: list[Results], alone: Results, number: int
    ) -> None:
        expected = alone["known"][number]
        both = [found["known"][number] for found in ranks]
        torch.testing.assert_close((both[0]["loss"] + both[1]["loss"]) / RANKS, expected["loss"])
        gradient = torch.cat([found["gradient"] for found in both]) / RANKS
        torch.testing.assert_close(gradient, expected["gradient"])

    def test_a_mean_of_each_ranks_own_labels_would_have_been_something_else(
        self, alone: Results
    ) -> None:
        halves = zip(
            numbers(IMAGES, 3, seed=9).chunk(RANKS),
            torch.tensor(KNOWN[0]).chunk(RANKS),
            strict=True,
        )
        own = torch.stack([known_label_loss(*half) for half in halves])
        expected = alone["known"][0]["loss"]
        assert (own.mean() - expected).abs() > 0.01 * expected


@pytest.mark.parametrize("name", METHODS)
class TestMethod:
    def test_two_ranks_equal_one_big_batch_in_every_loss_and_metric(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        expected = alone["trained"][name]
        for found in ranks:
            torch.testing.assert_close(found["trained"][name]["losses"], expected["losses"])
            torch.testing.assert_close(found["trained"][name]["metrics"], expected["metrics"])
        first, second = (found["trained"][name]["own_losses"] for found in ranks)
        assert first[0] != second[0]  # each is of the rank's own images

    def test_two_ranks_equal_one_big_batch_in_every_gradient_of_every_step(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        for step, expected in enumerate(alone["trained"][name]["gradients"]):
            scale = max(float(gradient.abs().max()) for gradient in expected)
            assert scale > 1e-4
            for found in ranks:
                gradients = found["trained"][name]["gradients"][step]
                for gradient, whole in zip(gradients, expected, strict=True):
                    torch.testing.assert_close(gradient, whole, rtol=0.0, atol=1e-10 * scale)

    def test_both_ranks_end_in_the_state_of_one(
        self, ranks: list[Results], alone: Results, name: str
    ) -> None:
        first, second = (found["trained"][name]["state"] for found in ranks)
        expected = alone["trained"][name]["state"]
        assert first.keys() == second.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-10)
