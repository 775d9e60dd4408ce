"""Rotation prediction.

S. Gidaris, P. Singh, N. Komodakis: "Unsupervised Representation Learning by Predicting Image
Rotations", 2018, arXiv:1803.07728v1.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysl.errors import ShapeError
from raysl.methods.base import (
    Batch,
    ImageGrid,
    LossOutput,
    Method,
    MethodConfig,
    Progress,
    TrainingSet,
)
from raysl.nn.backbones import Backbone
from raysl.nn.geometry import entropy
from raysl.nn.precision import at_least_float32
from raysl.nn.rotations import NUM_ROTATIONS, rotate


def rotation_loss(logits: Tensor, turns: Tensor) -> Tensor:
    r"""Compute the cross entropy of the applied rotation.

    .. math::
        L = -\frac{1}{N} \sum_i \log F^{y_i}(g(X_i | y_i))

    Args:
        logits: ``(N, 4)``, any float dtype: column y is for a turn by y quarters.
        turns: y, ``(N,)`` int64 in 0 .. 3.

    Returns:
        Scalar >= 0, float32 (float64 for float64 logits). Equal logits give log 4.

    Raises:
        ShapeError: If the shapes do not fit.

    Source: Eqs. (2) and (3); with all four turns of an image among the rows, their mean is eq. (3).
    """
    if logits.shape != (len(turns), NUM_ROTATIONS) or turns.ndim != 1:
        raise ShapeError(
            f"logits must be (N, 4) and turns (N,); got {tuple(logits.shape)}, {tuple(turns.shape)}"
        )
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(at_least_float32(logits), turns)


class RotationConfig(MethodConfig):
    """Settings of rotation prediction."""

    name: Literal["rotation"] = "rotation"
    rotations: Literal["all", "one"] = "all"
    """all: the four turns of every image in the same batch, as in the paper, which found it better
    (sec. 3.1): four times the work for an image. one: a random turn of each (VISSL)."""

    @property
    def num_views(self) -> int:
        """One upright view, which the method rotates."""
        return 1


class Rotation(Method):
    """Classify by how many quarter turns an image was rotated, which requires its content."""

    Config = RotationConfig
    loss_is_mean_over_images = True

    def __init__(self, config: RotationConfig, backbone: Backbone, data: TrainingSet) -> None:
        super().__init__(config, backbone, data)
        self.rotations = config.rotations
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.embed_dim, NUM_ROTATIONS)

    @property
    def encoder(self) -> Backbone:
        """The backbone without the classifier of turns."""
        return self.backbone

    def loss(self, batch: Batch, progress: Progress) -> LossOutput:
        """Rotate the images and classify the rotations.

        The features are those of the upright images with ``rotations="all"``, otherwise those of
        the rotated images.
        """
        images = batch.views[0]
        n, device = len(images), images.device
        if self.rotations == "all":
            images = images.repeat(NUM_ROTATIONS, 1, 1, 1)  # (4N, 3, S, S), upright rows first
            turns = torch.arange(NUM_ROTATIONS, device=device).repeat_interleave(n)
        else:
            turns = torch.randint(NUM_ROTATIONS, (n,), device=device)
        features = self.backbone(rotate(images, turns))
        logits = self.classifier(features)
        loss, features = rotation_loss(logits, turns), features[:n].detach()
        if not progress.is_logged:
            return LossOutput(loss, features, {})
        with torch.no_grad():
            metrics = {
                "rotation/accuracy": (logits.argmax(dim=1) == turns).float().mean(),
                # log 4 = 1.386 at chance level.
                "rotation/entropy": entropy(logits.float().softmax(dim=1)),
            }
        return LossOutput(loss, features, metrics)

    @torch.no_grad()
    def pictures(self, batch: Batch, progress: Progress) -> Mapping[str, ImageGrid]:
        """Show each image in its four turns, with the probability of the correct class."""
        images = batch.views[0]
        columns, titles = [], []
        for k in range(NUM_ROTATIONS):
            rotated = rotate(images, torch.full((len(images),), k, device=images.device))
            probability = (
                self.classifier(self.backbone(rotated)).float().softmax(dim=1)[:, k].mean()
            )
            columns.append(rotated)
            titles.append(f"{90 * k} deg\np = {float(probability):.2f}")
        caption = (
            "Each image in its four turns; p is the mean probability, over these images, that the "
            "network gives to the correct turn (0.25 without learning)."
        )
        return {"rotations": ImageGrid(torch.stack(columns, dim=1), tuple(titles), caption)}


METHOD = Rotation
