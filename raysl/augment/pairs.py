"""The view recipe of SimCLR's study of single augmentations and pairs of them."""

from typing import Literal

from raysl.augment.crop import Crop
from raysl.augment.ops import (
    Blur,
    ColorJitter,
    CropPart,
    Cutout,
    Flip,
    Grey,
    Noise,
    Op,
    QuarterTurn,
    Sobel,
)
from raysl.augment.pipeline import View
from raysl.config.base import Config, PositiveInt

Augmentation = Literal["crop", "cutout", "color", "sobel", "noise", "blur", "rotate"]

_OPS: dict[Augmentation, tuple[Op, ...]] = {
    "crop": (CropPart(), Flip()),
    "cutout": (Cutout(prob=1.0),),
    "color": (ColorJitter(), Grey()),
    "sobel": (Sobel(prob=1.0),),
    "noise": (Noise(prob=1.0),),
    "blur": (Blur(prob=1.0),),
    "rotate": (QuarterTurn(prob=1.0),),
}


class PairViews(Config):
    """One view with one or two augmentations, and one plain view: SimCLR's study of pairs.

    Source: Chen et al. 2020, arXiv:2002.05709v3, sec. 3.1 with figures 4 and 5: both branches get
    the same image, and only one is transformed. Cropping includes a flip, colour distortion is
    jitter and grey, rotation is by 90, 180 or 270 degrees.
    Departs: The plain view is the largest centred square; the authors crop each image once at
    random for both branches, because the shapes of ImageNet's images vary. Images and crops are
    resized bilinearly, theirs bicubically. The strengths of noise and cutout are not published.
    """

    recipe: Literal["simclr_pair"] = "simclr_pair"
    size_px: PositiveInt = 224
    """Side of both views in pixels."""
    antialias: bool = True
    """Average over the pixels when an image shrinks; false is faster."""
    first: Augmentation = "crop"
    """Augmentation of the one view that is transformed; the other view is plain."""
    second: Augmentation = "color"
    """Augmentation applied after the first; if both are the same, it is applied once."""

    def views(self) -> tuple[View, ...]:
        """Return the transformed view and the plain one."""
        whole = Crop(short_side=(1.0, 1.0), antialias=self.antialias)
        ops = _OPS[self.first]
        if self.second != self.first:
            ops += _OPS[self.second]
        return (
            View(size_px=self.size_px, crop=whole, ops=ops),
            View(size_px=self.size_px, crop=whole),
        )
