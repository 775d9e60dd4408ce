"""Settings of fine-tuning after pretraining, with part of the labels, from any layer of the head.

T. Chen, S. Kornblith, K. Swersky, M. Norouzi, G. Hinton: "Big Self-Supervised Models are Strong
Semi-Supervised Learners", 2020, arXiv:2006.10029v2 (SimCLR v2).
"""

from typing import Annotated

from pydantic import Field

from raysl.config.base import Config, NonNegativeFloat, PositiveFloat, PositiveInt, Probability


class FinetuneConfig(Config):
    """How to fine-tune the encoder, the first layers of its head and a new linear classifier.

    The defaults are those of SimCLR (arXiv:2002.05709v3, B.5), which also describes the views:
    random crops and flips alone, no warm-up, SGD with Nesterov momentum, no weight decay.

    All parameters are trained, including those frozen in pretraining; batch norm uses the
    statistics of the batch. After pretraining, ``raysl finetune`` offers more settings.

    Departs: SimCLR v2 uses LARS, with a learning rate of 0.005 times the root of the batch, and
    batches of 1,024. Here the learning rate decays along half a cosine, as in the authors' code.
    """

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the labelled training images to use, balanced over the classes as far as possible,
    at least one of each."""
    head_layers: Annotated[int, Field(ge=0)] = 0
    """Number of layers of the projection head to keep on the encoder, with batch norm and
    nonlinearity. 0 is SimCLR's fine-tuning, 1 that of version 2 with few labels and a head of three
    layers."""
    epochs: PositiveInt = 30
    """Passes over these images: 30 for a tenth of ImageNet's labels, 60 for a hundredth (v2, sec.
    3.1). Fewer images mean fewer steps: increase it for small sets."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images of a step, at most all images (the papers: 4,096, version 2 1,024)."""
    base_lr: PositiveFloat = 0.05
    """Initial learning rate for a batch of 256; scaled linearly with the batch."""
    sgd_momentum: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Nesterov momentum."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of weights, not of biases and norms; the papers use none."""
    min_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.08
    """Smallest area of a random crop over the image's."""
    flip_prob: Probability = 0.5
    """Probability of mirroring an image: 0 where left and right matter, as for digits."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the labels used, the order, the views and the classifier."""
