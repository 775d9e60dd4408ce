"""Fine-tuning on a part of the labels, from any layer of the projection head.

T. Chen, S. Kornblith, K. Swersky, M. Norouzi, G. Hinton: "Big Self-Supervised Models are Strong
Semi-Supervised Learners", 2020, arXiv:2006.10029v2 (SimCLR v2).
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raysl.augment.crop import Image
from raysl.augment.ops import Flip
from raysl.augment.pipeline import Crop, View, make_views
from raysl.config.base import Config, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from raysl.errors import DivergedError
from raysl.evaluate.features import EvalImages, Rows, outputs
from raysl.nn.backbones import Backbone
from raysl.nn.batchnorm import set_batch_norm_scope
from raysl.nn.heads import first_layers
from raysl.optim.build import OptimConfig, scheduled_optimizer
from raysl.sources.source import Labels

_CLASSIFIER_STD = 0.01  # of its first weights, as in the authors' code
_ORDER = 1  # what the order of images is drawn by, besides the seed


class FinetuneConfig(Config):
    """How the encoder, the first layers of its head and a new linear classifier learn from labels.

    The defaults are those of SimCLR (arXiv:2002.05709v3, B.5), which also describes the views:
    random crops and flips alone, no warm-up, SGD with Nesterov momentum, no weight decay.

    Departs: SimCLR v2 takes LARS, with a learning rate of 0.005 times the root of the batch, and
    batches of 1,024. Here the learning rate decays along half a cosine, as in the authors' code.
    """

    label_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the labelled training images (of evaluate.max_train_images at most) that is used,
    as many of each class as far as they reach, and at least one of each."""
    head_layers: Annotated[int, Field(ge=0)] = 0
    """Layers of the projection head that stay on the encoder, with batch norm and nonlinearity. 0
    is SimCLR's fine-tuning, 1 that of version 2 with few labels and a head of three layers."""
    epochs: PositiveInt = 30
    """Passes over these images: 30 for a tenth of ImageNet's labels, 60 for a hundredth (v2, sec.
    3.1). Fewer images make fewer steps: give small sets more."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Images of a step, at most as many as there are (the papers: 4,096, version 2 1,024)."""
    base_lr: PositiveFloat = 0.05
    """Learning rate at the start for a batch of 256, in proportion to the batch."""
    sgd_momentum: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Nesterov momentum."""
    weight_decay: NonNegativeFloat = 0.0
    """Of weights, not of biases and norms; the papers have none."""
    min_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.08
    """Least area of a random crop over the image's."""
    flip_prob: Probability = 0.5
    """How often an image is mirrored: 0 where left and right matter, as in digits."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the labels that are used, the order, the views and the classifier."""


class Finetuned(NamedTuple):
    """What fine-tuning gave."""

    top1: float
    """Accuracy on the test images in [0, 1]."""
    rows: list[int]
    """The rows of the training source whose labels were used, in order."""


def finetune(
    encoder: Backbone,
    head: nn.Sequential | None,
    config: FinetuneConfig,
    *,
    train: EvalImages,
    test: EvalImages,
    num_classes: int,
    to_input: Callable[[npt.NDArray[np.uint8]], Tensor],
) -> Finetuned:
    """Fine-tune a copy of an encoder and measure it; encoder and head stay as they are.

    Everything learns, also what the pretraining had frozen. Batch norm takes the statistics of the
    batch, whatever its scope was: this runs in one process, with no collective.

    Args:
        encoder: What was pretrained.
        head: The projection head on it, or None.
        config: How.
        train: Labelled images, of which a part is used.
        test: Labelled images, seen as the probes see them.
        num_classes: Above every label.
        to_input: Turns ``(B, S, S, 3)`` uint8 into the encoder's input on its device.

    Raises:
        ConfigError: If the head has fewer layers than are to be kept.
        DivergedError: If the loss is not finite.

    Source: Sec. 2.2: f_task(x) = W_task sigma(W_1 f(x)) for the first layer.
    """
    places = balanced_subset(train.labels, fraction=config.label_fraction, seed=config.seed)
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        model = _classifier_on(encoder, head, config.head_layers, num_classes).to(device)
        _train(model, config, train, places, to_input=to_input)
    logits = outputs(model, test, np.arange(len(test)), to_input=to_input)
    right = logits.argmax(dim=1).cpu().numpy() == test.labels
    return Finetuned(float(right.mean()), sorted(train.rows[places].tolist()))


def balanced_subset(labels: Labels, *, fraction: float, seed: int) -> Rows:
    """Return the places of a part of the labels, the same number of each class.

    Where a class has too few, the others fill up; 1 takes all. With the same seed a smaller part
    lies within a larger one.

    Args:
        labels: ``(M,)`` class numbers.
        fraction: Share of the M labels, in (0, 1]; at least one of each class is taken.
        seed: Of the draw.

    Returns:
        Places in [0, M), in order.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    members = [rng.permutation(np.flatnonzero(labels == number)) for number in classes]
    # In turns, one of each class; who comes first in a turn is random too.
    turn = np.concatenate([np.arange(len(each)) for each in members])
    within = np.repeat(rng.permutation(len(classes)), [len(each) for each in members])
    order = np.concatenate(members)[np.lexsort((within, turn))]
    return np.sort(order[: max(len(classes), round(fraction * len(labels)))])


def _classifier_on(
    encoder: Backbone, head: nn.Sequential | None, num_layers: int, num_classes: int
) -> nn.Sequential:
    """Copy the encoder and the first layers of its head, and put a new linear classifier on."""
    kept = first_layers(nn.Sequential() if head is None else head, num_layers)
    model = copy.deepcopy(nn.Sequential(encoder, kept)).requires_grad_(True)
    widths = [layer.out_features for layer in kept if isinstance(layer, nn.Linear)]
    classifier = nn.Linear([encoder.embed_dim, *widths][-1], num_classes)
    nn.init.normal_(classifier.weight, std=_CLASSIFIER_STD)
    nn.init.zeros_(classifier.bias)
    return nn.Sequential(set_batch_norm_scope(model, "worker"), classifier)


def _train(
    model: nn.Module,
    config: FinetuneConfig,
    images: EvalImages,
    places: Rows,
    *,
    to_input: Callable[[npt.NDArray[np.uint8]], Tensor],
) -> None:
    batch_size = min(config.batch_size, len(places))
    steps_per_epoch = len(places) // batch_size
    optimizer = scheduled_optimizer(
        model.parameters(),
        OptimConfig(
            name="sgd",
            base_lr=config.base_lr,
            nesterov=True,
            sgd_momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
        ),
        global_batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
    )
    model.train()
    for step, (pixels, labels) in enumerate(_batches(config, images, places, batch_size)):
        optimizer.prepare(step)
        logits = model(to_input(pixels)).float()
        loss = F.cross_entropy(logits, torch.from_numpy(labels).to(logits.device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.optimizer.step()
    if not loss.isfinite():
        raise DivergedError(
            f"evaluate.finetune: the loss is {loss.item()} after {step + 1} steps; lower "
            f"evaluate.finetune.base_lr={config.base_lr:g}"
        )


def _batches(
    config: FinetuneConfig, images: EvalImages, places: Rows, batch_size: int
) -> Iterator[tuple[npt.NDArray[np.uint8], Labels]]:
    """Yield random crops ``(B, S, S, 3)`` and labels ``(B,)``, full batches in random order."""
    crop = Crop(scale=(config.min_scale, 1.0))
    view = View(size_px=images.size_px, crop=crop, ops=(Flip(prob=config.flip_prob),))
    rng = np.random.default_rng([config.seed, _ORDER])
    with ThreadPoolExecutor(images.num_threads, thread_name_prefix="raysl-finetune") as pool:
        for epoch in range(config.epochs):

            def make(place: int, epoch: int = epoch) -> Image:
                row = int(images.rows[place])
                of_kinds = make_views(
                    images.image(place), [view], seed=config.seed, epoch=epoch, index=row
                )
                return of_kinds[0][0]

            order = rng.permutation(places)
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chosen = order[start : start + batch_size]
                yield np.stack(list(pool.map(make, chosen.tolist()))), images.labels[chosen]
