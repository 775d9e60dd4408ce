"""Self-supervised pretraining of image encoders on Ray."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_classifier", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:
    # Data workers import this package and must not load torch, which these need.
    if name == "load_encoder":
        return import_module("raysl.encoder").load_encoder
    if name == "load_classifier":
        return import_module("raysl.nn.classifier").load_classifier
    if name == "pretrain":
        import_module("raysl.commands.threads").let_waiting_threads_sleep()  # before torch is there
        return import_module("raysl.commands.from_python").pretrain
    raise AttributeError(f"module 'raysl' has no attribute {name!r}")
