"""The base class of every configuration section, and the types that sections share."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


GIVEN = object()
"""Stands for every value except null in :class:`Idle`."""


class Idle(NamedTuple):
    """Settings of a section that have no effect while other settings have certain values."""

    settings: tuple[str, ...]
    """Dotted keys within the section."""
    off: Mapping[str, tuple[Any, ...]]
    """The other settings, each with some of its values. ``settings`` have no effect if each of the
    other settings has one of its values listed here. ``0`` also stands for a duration of length
    zero."""


class Config(BaseModel):
    """A strict and frozen section: an unknown key is an error, and values never change."""

    idle: ClassVar[tuple[Idle, ...]] = ()
    """Rules for settings without effect; see :mod:`raysl.config.idle`."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @classmethod
    def idle_by(cls, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield settings without effect that :attr:`idle` cannot express, each with the reason.

        Args:
            values: Plain values of the section, possibly invalid.
        """
        yield from ()


def check_ranges(section: Config, *names: str) -> None:
    """Raise ValueError unless each of these settings is None or [low, high] with low <= high."""
    for name in names:
        low, high = getattr(section, name) or (0, 0)
        if low > high:
            raise ValueError(f"{name} is [low, high] with low <= high; got [{low}, {high}]")


class Duration(Config):
    """A length of training, given in exactly one unit."""

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(ge=0.0)] | None = None
    """Passes over the training images."""
    fraction: Probability | None = None
    """Fraction of the whole run, in [0, 1]."""

    @model_validator(mode="after")
    def _exactly_one_unit(self) -> "Duration":
        units = [
            unit for unit in ("steps", "epochs", "fraction") if getattr(self, unit) is not None
        ]
        if len(units) != 1:
            raise ValueError(f"give exactly one of steps, epochs, fraction; got {units or 'none'}")
        return self

    def in_steps(self, *, steps_per_epoch: int, total_steps: int) -> int:
        """Return this duration in optimizer steps, rounded to the nearest."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return round(self.epochs * steps_per_epoch)
        return round((self.fraction or 0.0) * total_steps)
