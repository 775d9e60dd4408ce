"""Every operation that a view's ``ops`` can name in a configuration."""

from typing import Annotated

from pydantic import Field

from raysl.augment.filters import Blur, Noise, Sobel
from raysl.augment.geometric import CropPart, Cutout, Flip, QuarterTurn, Rotate
from raysl.augment.photometric import ColorJitter, Grey, Solarise

__all__ = [
    "Blur",
    "ColorJitter",
    "CropPart",
    "Cutout",
    "Flip",
    "Grey",
    "Noise",
    "Op",
    "QuarterTurn",
    "Rotate",
    "Sobel",
    "Solarise",
]

Op = Annotated[
    CropPart
    | Flip
    | Rotate
    | QuarterTurn
    | ColorJitter
    | Grey
    | Blur
    | Solarise
    | Noise
    | Sobel
    | Cutout,
    Field(discriminator="op"),
]
