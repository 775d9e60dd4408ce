"""The base class of view recipes: their size and the interpolation of crops."""

from raysl.augment.crop import Interpolation
from raysl.augment.pipeline import Crop
from raysl.config.base import Config, PositiveInt


class Recipe(Config):
    """Settings that all recipes share."""

    size_px: PositiveInt = 224
    """Side of the views in pixels; of the large ones, if there are several sizes."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of crops. bicubic keeps more fine detail, and is slower where it shrinks."""
    antialias: bool = True
    """Average over the pixels when a crop shrinks, as torchvision does; false is faster."""

    def crop(
        self,
        scale: tuple[float, float] = (0.08, 1.0),
        *,
        short_side: tuple[float, float] | None = None,
        pad: float | None = None,
    ) -> Crop:
        """Return a crop with the recipe's interpolation."""
        return Crop(
            scale=scale,
            short_side=short_side,
            pad=pad,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )
