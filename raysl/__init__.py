"""Self-supervised pretraining of image encoders on Ray."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_classifier", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:
    # Data workers import this package and must not load torch, which these need.
    if name == "load_encoder":
        from raysl.encoder.file import load_encoder  # noqa: PLC0415 - loads torch

        return load_encoder
    if name == "load_classifier":
        from raysl.nn.classifier import load_classifier  # noqa: PLC0415 - loads torch

        return load_classifier
    if name == "pretrain":
        from raysl.cli import let_waiting_threads_sleep  # noqa: PLC0415

        let_waiting_threads_sleep()  # before torch is loaded
        from raysl.run.from_python import pretrain  # noqa: PLC0415 - loads torch

        return pretrain
    raise AttributeError(f"module 'raysl' has no attribute {name!r}")
