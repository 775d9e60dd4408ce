"""Self-supervised methods, one file per paper; the file's name is the method's name."""

import importlib
import pkgutil

from raysl.errors import ConfigError
from raysl.methods.base import Method

_NOT_METHODS = ("base",)


def method_names() -> list[str]:
    """Return the names of the built-in methods."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name not in _NOT_METHODS)


def load_method(name: str) -> type[Method]:
    """Return the class of a method.

    Args:
        name: ``simclr`` loads ``raysl.methods.simclr``; a dotted name, such as
            ``my_package.my_method``, loads that module. Either holds the class as ``METHOD``.

    Raises:
        ConfigError: If there is no such method.
    """
    if name.startswith(".") or ("." not in name and name not in method_names()):
        raise ConfigError(
            f"method.name: got {name!r}, allowed: {', '.join(method_names())}, or the dotted name "
            f"of a module of your own that defines METHOD"
        )
    try:
        module = importlib.import_module(name if "." in name else f"raysl.methods.{name}")
        method: type[Method] = module.METHOD
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method.name={name}: {error}") from None
    return method


def pretraining_method_names() -> list[str]:
    """Return the names of the methods for pretraining: all except those that train a classifier."""
    return [name for name in method_names() if not load_method(name).Config.classifies]
