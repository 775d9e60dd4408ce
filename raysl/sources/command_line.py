"""Open the source that a command line names, with its settings."""

import argparse
from typing import TypeVar

from raysl.config.idle import refuse_idle
from raysl.config.load import apply_overrides, validate
from raysl.errors import ConfigError
from raysl.sources.open import open_source
from raysl.sources.place import absolute_config
from raysl.sources.source import DataConfig, LocatedSource, Source

C = TypeVar("C", bound=LocatedSource)

# Such commands read each row group once, so the cache can be small.
_WINDOW_MIB = 1


def open_argument(arguments: argparse.Namespace, model: type[C], *, where: str) -> tuple[C, Source]:
    """Validate ``arguments.source`` and its overrides against a model, and open the source.

    Args:
        arguments: Parsed arguments with ``source`` and ``overrides``.
        model: Configuration class of the command.
        where: Name of the command for error messages.

    Raises:
        ConfigError: Lists every bad key at once; also if the source is given twice.
        DataError: If the source does not exist or has no usable images.
    """
    values = apply_overrides({"source": arguments.source}, arguments.overrides)
    if values["source"] != arguments.source:
        raise ConfigError(f"give the source once: {arguments.source} or {values['source']}")
    config = absolute_config(validate(model, values, where=where))
    refuse_idle(model, values, where=where)
    data = DataConfig(
        source=config.source,
        torchvision_root=config.torchvision_root,
        shuffle_window_mib=_WINDOW_MIB,
    )
    return config, open_source(config, data=data)
