"""The protocols that train the whole network: on all labels, on a tenth, on a hundredth.

They follow SimCLR, arXiv:2002.05709v3, appendix B.5 and B.8, for residual networks: random crops
and flips, SGD with Nesterov momentum, no weight decay. Vision transformers take the settings of MAE
(arXiv:2111.06377v3, table 9): AdamW with a learning rate that falls from layer to layer.
"""

from typing import Annotated

from pydantic import Field

from raysl.config.base import Config, NonNegativeFloat, PositiveFloat, PositiveInt


class FinetuneProtocol(Config):
    """Train the pretrained encoder and a new classifier on labels."""

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the labels, as many of each class as far as they reach; drawn by the seed."""
    epochs: PositiveInt = 30
    """Passes over these images."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images of a step, at most as many as there are."""
    base_lr: PositiveFloat = 0.05
    """Residual networks and all that are no vision transformers: of SGD, for a batch of 256."""
    weight_decay: NonNegativeFloat = 0.0
    """The same: of weights, not of biases and norms."""
    vit_base_lr: PositiveFloat = 1e-3
    """Vision transformers: of AdamW, for a batch of 256."""
    vit_weight_decay: NonNegativeFloat = 0.05
    """Vision transformers."""
    vit_layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Vision transformers: factor on the learning rate from a block to the one below it."""
    head_layers: Annotated[int, Field(ge=0)] = 0
    """Layers of the projection head that stay on the encoder; 0 is plain fine-tuning."""

    def text(self) -> str:
        """Return what identifies a number."""
        share = "all" if self.label_fraction == 1 else f"{self.label_fraction:.0%} of"
        return f"whole network, {self.epochs} epochs on {share} labels"


class SemiTenth(FinetuneProtocol):
    """Semi-supervised: a tenth of the labels."""

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1


class SemiHundredth(FinetuneProtocol):
    """Semi-supervised: a hundredth of the labels."""

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    epochs: PositiveInt = 60
