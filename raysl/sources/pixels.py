"""The settings of how a source's files are converted to 8-bit RGB pixels."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from raysl.config.base import Config

_Percent = Annotated[float, Field(ge=0.0, le=100.0)]


class Bits(Config):
    """Scale the lowest bits, for detectors that store 12 bits in 16."""

    bits: Annotated[int, Field(ge=1, le=32)]
    """Number of the lowest bits."""


class Percentiles(Config):
    """Scale between two percentiles of each image's values, for example for microscopes."""

    percentile: tuple[_Percent, _Percent]
    """[low, high]: the percentiles that become black and white."""

    @model_validator(mode="after")
    def _rises(self) -> "Percentiles":
        if self.percentile[0] >= self.percentile[1]:
            raise ValueError(f"the first must be below the second; got {list(self.percentile)}")
        return self


def _rising(levels: tuple[float, float]) -> tuple[float, float]:
    if levels[0] >= levels[1]:
        raise ValueError("black must be below white")
    return levels


def _in_one_line(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Report all allowed forms in one error, instead of one error per form."""
    try:
        return validate(_with_tuples(value))
    except ValidationError:
        raise ValueError(
            f"give [low, high] with low below high, {{bits: 1 to 32}}, or "
            f"{{percentile: [low, high]}} of 0 to 100; got {value!r}"
        ) from None


def _with_tuples(value: Any) -> Any:
    """Convert lists in plain values to tuples, as the strict types require."""
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


Intensity = Annotated[
    Annotated[tuple[float, float], AfterValidator(_rising)] | Bits | Percentiles,
    WrapValidator(_in_one_line),
]
ColorProfile = Literal["ignore", "convert"]
Pages = Literal["refuse", "first", "channels"]


class Decoding(NamedTuple):
    """The settings of ``SourceConfig`` that the decoder needs."""

    intensity: Intensity | None = None
    color_profile: ColorProfile = "convert"
    pages: Pages = "refuse"


PLAIN = Decoding()
