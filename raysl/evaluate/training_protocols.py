"""The protocols that train the whole network: on all labels, on a tenth, on a hundredth.

They follow SimCLR, arXiv:2002.05709v3, appendix B.5, where the network is no vision transformer:
random crops and flips, SGD with Nesterov momentum, no weight decay. Vision transformers take the
settings that MAE has for ViT-Base (arXiv:2111.06377v3, and the authors' FINETUNE.md), without
RandAugment and erasing; MAE's own also its mean of patches instead of the class token.
"""

import json
from typing import Annotated, Any

from pydantic import Field

from raysl.config.base import Config, NonNegativeFloat, PositiveFloat, PositiveInt, Probability


class FinetuneProtocol(Config):
    """Train the pretrained encoder and a new classifier on labels."""

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the labels, as many of each class as far as they reach; drawn by the seed."""
    epochs: PositiveInt = 30
    """Passes over these images, of all but vision transformers."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images of a step, at most as many as there are."""
    base_lr: PositiveFloat = 0.05
    """Of SGD, for a batch of 256."""
    weight_decay: NonNegativeFloat = 0.0
    """Of weights, not of biases and norms, with SGD."""
    vit_epochs: PositiveInt = 100
    """Vision transformers."""
    vit_base_lr: PositiveFloat = 5e-4
    """Vision transformers: of AdamW, for a batch of 256."""
    vit_weight_decay: NonNegativeFloat = 0.05
    """Vision transformers."""
    vit_layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65
    """Vision transformers: factor on the learning rate from a block to the one below it."""
    vit_warmup_epochs: Annotated[int, Field(ge=0)] = 5
    """Vision transformers: over which the learning rate rises."""
    vit_drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Vision transformers: stochastic depth."""
    vit_label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Vision transformers."""
    vit_mixup: NonNegativeFloat = 0.8
    """Vision transformers: alpha of mixup."""
    vit_cutmix: NonNegativeFloat = 1.0
    """Vision transformers: alpha of cutmix."""
    head_layers: Annotated[int, Field(ge=0)] = 0
    """Layers of the projection head that stay on the encoder; 0 is plain fine-tuning."""
    min_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.08
    """Least area of a random crop over the image's."""
    flip_prob: Probability = 0.5
    """How often an image is mirrored: 0 where left and right matter, as in digits."""

    def text(self) -> str:
        """Return what identifies a number."""
        share = "all" if self.label_fraction == 1 else f"{100 * self.label_fraction:g} % of the"
        return f"whole network, {self.epochs} epochs, {share} labels"

    def overrides(self, *, is_vit: bool, size_px: int, num_images: int, seed: int) -> list[str]:
        """Return the settings of the run that trains the network, but for where it lies.

        Args:
            is_vit: Whether it is a vision transformer.
            size_px: Side of its images.
            num_images: Labelled training images that there are.
            seed: Of labels, views, order and classifier.
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
            "train.global_batch_size": min(self.batch_size, used),
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
