"""How a source's files become 8-bit RGB pixels, where the files leave a choice."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from raysl.config.base import Config

_Percent = Annotated[float, Field(ge=0.0, le=100.0)]


class Bits(Config):
    """The lowest so many bits are in use, as of detectors that write 12 bits into 16."""

    bits: Annotated[int, Field(ge=1, le=32)]


class Percentiles(Config):
    """From one percentile of each image's own values to another, as of microscopes."""

    percentile: tuple[_Percent, _Percent]

    @model_validator(mode="after")
    def _rises(self) -> "Percentiles":
        if self.percentile[0] >= self.percentile[1]:
            raise ValueError(f"the first must be below the second; got {list(self.percentile)}")
        return self


Intensity = tuple[float, float] | Bits | Percentiles
ColorProfile = Literal["ignore", "convert"]
Pages = Literal["refuse", "first", "channels"]


class Decoding(NamedTuple):
    """What the decoder has to be told besides the bytes; the settings of ``SourceConfig``."""

    intensity: Intensity | None = None
    color_profile: ColorProfile = "convert"
    pages: Pages = "refuse"


PLAIN = Decoding()
