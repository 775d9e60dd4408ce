"""The protocols that train the whole network: on all labels, on a tenth, on a hundredth.

Networks other than vision transformers follow SimCLR, arXiv:2002.05709v3, appendix B.5: random
crops and flips, SGD with Nesterov momentum, no weight decay. Vision transformers use MAE's settings
for ViT-Base (arXiv:2111.06377v3, and the authors' FINETUNE.md), without RandAugment and
random erasing; those pretrained by MAE use the mean of the patches instead of the class token.
"""

import json
from typing import Annotated, Any

from pydantic import Field

from raysl.config.base import Config, NonNegativeFloat, PositiveFloat, PositiveInt, Probability


class FinetuneProtocol(Config):
    """Train the pretrained encoder and a new classifier on labels."""

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the labels, balanced over the classes as far as possible; drawn by the seed."""
    epochs: PositiveInt = 30
    """Passes over these images, except for vision transformers."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images per step; at most the number of training images."""
    base_lr: PositiveFloat = 0.05
    """Learning rate of SGD for a batch of 256."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay with SGD; biases and norms have none."""
    vit_epochs: PositiveInt = 100
    """Vision transformers: passes over these images."""
    vit_base_lr: PositiveFloat = 5e-4
    """Vision transformers: learning rate of AdamW for a batch of 256."""
    vit_weight_decay: NonNegativeFloat = 0.05
    """Vision transformers: weight decay."""
    vit_layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65
    """Vision transformers: factor on the learning rate from a block to the one below it."""
    vit_warmup_epochs: Annotated[int, Field(ge=0)] = 5
    """Vision transformers: epochs of warm-up."""
    vit_drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Vision transformers: stochastic depth."""
    vit_label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Vision transformers: label smoothing."""
    vit_mixup: NonNegativeFloat = 0.8
    """Vision transformers: alpha of mixup."""
    vit_cutmix: NonNegativeFloat = 1.0
    """Vision transformers: alpha of cutmix."""
    head_layers: Annotated[int, Field(ge=0)] = 0
    """Number of layers of the projection head to keep on the encoder; 0 is plain fine-tuning."""
    min_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.08
    """Smallest area of a random crop as a share of the image."""
    flip_prob: Probability = 0.5
    """Probability of a horizontal flip; 0 if left and right matter, as for digits."""

    def text(self) -> str:
        """Return the text that identifies results with these settings."""
        share = "all" if self.label_fraction == 1 else f"{100 * self.label_fraction:g} % of the"
        return f"whole network, {self.epochs} epochs, {share} labels"

    def overrides(
        self, *, is_vit: bool, size_px: int, num_images: int, seed: int, batch_multiple: int = 1
    ) -> list[str]:
        """Return the settings of the run that trains the network, without its paths.

        Args:
            is_vit: Whether the network is a vision transformer.
            size_px: Side of the network's input.
            num_images: Number of labelled training images.
            seed: Seed of labels, views, order and classifier.
            batch_multiple: The batch size is a multiple of it.
        """
        used = max(1, round(self.label_fraction * num_images))
        sgd = {
            "name": "sgd",
            "base_lr": self.base_lr,
            "nesterov": True,
            "sgd_momentum": 0.9,
            "weight_decay": self.weight_decay,
        }
        adamw = {
            "name": "adamw",
            "base_lr": self.vit_base_lr,
            "weight_decay": self.vit_weight_decay,
            "layer_decay": self.vit_layer_decay,
            "warmup": {"epochs": self.vit_warmup_epochs},
        }
        values: dict[str, Any] = {
            "seed": seed,
            "data.labels": {"fraction": self.label_fraction, "seed": seed, "only": True},
            "data.views": {
                "recipe": "finetune",
                "size_px": size_px,
                "min_scale": self.min_scale,
                "flip_prob": self.flip_prob,
            },
            "method.head_layers": self.head_layers,
            "optim": adamw if is_vit else sgd,
            "train.epochs": float(self.vit_epochs if is_vit else self.epochs),
            "train.global_batch_size": max(1, min(self.batch_size, used) // batch_multiple)
            * batch_multiple,
        }
        if is_vit:
            values |= {
                "backbone.drop_path": self.vit_drop_path,
                "method.label_smoothing": self.vit_label_smoothing,
                "method.mixup": self.vit_mixup,
                "method.cutmix": self.vit_cutmix,
            }
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]


class SemiTenth(FinetuneProtocol):
    """Semi-supervised: a tenth of the labels."""

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1


class SemiHundredth(FinetuneProtocol):
    """Semi-supervised: a hundredth of the labels."""

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    epochs: PositiveInt = 60
