"""Means and standard deviations of other projects' training images, which files do not store."""

from typing import NamedTuple

Channels = tuple[float, float, float]


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel of images in [0, 1]."""

    mean: Channels
    std: Channels
    origin: str
    """Where the values are from, for messages."""


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet's")
PIXELS = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "none, unnormalised pixels")

# By data.dataset; source: solo-learn's solo/data/pretrain_dataloader.py.
SOLO_LEARN = {
    "cifar10": Normalisation(
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR-10's in solo-learn"
    ),
    "cifar100": Normalisation(
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR-100's in solo-learn"
    ),
    "stl10": Normalisation(
        (0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261), "STL-10's in solo-learn"
    ),
    "imagenet": IMAGENET,
    "imagenet100": IMAGENET,
}
# Standard deviations within an image; source: main_supcon.py of SupContrast, utils.py of
# leftthomas/SimCLR.
CIFAR10_WITHIN_IMAGE = Normalisation(
    (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "CIFAR-10's in these ports"
)
