"""List the channel means and deviations that other projects train with; files omit them."""

from typing import NamedTuple

Channels = tuple[float, float, float]


class Normalisation(NamedTuple):
    """The values subtracted from the channels of an image in [0, 1], and those that divide them."""

    mean: Channels
    std: Channels
    whose: str


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet's")
PIXELS = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "none, the pixels as they are")
HALVES = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "pixels in [-1, 1]")

# solo-learn's solo/data/pretrain_dataloader.py, by data.dataset.
OF_SOLO_LEARN = {
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
# main_supcon.py of SupContrast, utils.py of leftthomas/SimCLR: deviations within an image.
CIFAR10_WITHIN = Normalisation(
    (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "CIFAR-10's in these ports"
)
