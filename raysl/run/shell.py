"""Build commands to print, ready to paste into a shell."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raysl.config.load import parse_override
from raysl.errors import hide_passwords
from raysl.run.recipe import RunConfig

_LENGTH = re.compile(r"-\d+(\.\d+)?(e[+-]?\d+)?(epochs|steps)$")


class Typed(NamedTuple):
    """The configuration file and the overrides of a command line, as typed."""

    config_file: Path | str
    overrides: tuple[str, ...]


def command(verb: str, *words: object) -> str:
    """Return ``raysl VERB WORDS``, quoted for a shell and without the passwords of addresses."""
    return shlex.join(["raysl", *verb.split(), *(hide_passwords(str(word)) for word in words)])


def longer_command(typed: Typed, config: RunConfig, *, times: float) -> str:  # type: ignore[type-arg]
    """Return the command that trains the same run longer, under a name that states the length.

    Args:
        typed: The command line of the run; all its overrides except name and length are repeated.
        config: The run's configuration.
        times: Factor by which the new run is longer.
    """
    train = config.train
    length, unit = (train.steps, "steps") if train.steps else (train.epochs or 1, "epochs")
    amount = f"{times * length:g}" if unit == "epochs" else str(round(times * length))
    name = f"{_LENGTH.sub('', config.name)}-{amount}{unit}"
    others = without_keys(typed.overrides, "name", f"train.{unit}")
    return command("pretrain", typed.config_file, *others, f"name={name}", f"train.{unit}={amount}")


def without_keys(overrides: Sequence[str], *keys: str) -> list[str]:
    """Return the overrides of all keys except ``keys``."""
    return [override for override in overrides if parse_override(override)[0] not in keys]
