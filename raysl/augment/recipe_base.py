"""What all recipes of views have: their size, and how their crops are resized."""

from raysl.augment.crop import Interpolation
from raysl.augment.pipeline import Crop
from raysl.config.base import Config, PositiveInt


class Recipe(Config):
    """What all recipes have."""

    size_px: PositiveInt = 224
    """Side of the views in pixels; of the large ones, where there are several sizes."""
    interpolation: Interpolation = "bilinear"
    """How crops are resized. bicubic keeps more of what is fine, and is slower where it shrinks."""
    antialias: bool = True
    """Average over the pixels when a crop shrinks, as torchvision does; false is quicker."""

    def crop(
        self,
        scale: tuple[float, float] = (0.08, 1.0),
        *,
        short_side: tuple[float, float] | None = None,
        pad: float | None = None,
    ) -> Crop:
        """Return a crop that is resized as the recipe says."""
        return Crop(
            scale=scale,
            short_side=short_side,
            pad=pad,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )
