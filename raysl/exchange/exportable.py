"""The object of an export: a network in evaluation mode, and its metadata."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from raysl.encoder.file import described_backbone, encoder_file, load_encoder, read_description
from raysl.encoder.read import read_header
from raysl.errors import ConfigError, ExportError
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.classifier import load_classifier

# Batch sizes to compare a copy on, including others than it was traced with.
TRACED_BATCH = 2
_BATCHES = (1, TRACED_BATCH, 5)
_CLASSIFIER = "raysl-classifier"


class Exportable(NamedTuple):
    """A network that maps images to features, or to logits."""

    model: nn.Module
    """``(N, 3, S, S)`` float32, normalised -> ``(N, width)`` float32; on the CPU."""
    backbone: Backbone
    """The encoder in it."""
    config: BackboneConfig
    path: Path
    description: dict[str, Any]
    size_px: int
    width: int
    output: Literal["features", "logits"]

    def example(self) -> Tensor:
        """Return random images for tracing the network."""
        return self.images(TRACED_BATCH)

    def images(self, count: int) -> Tensor:
        """Return random images, always the same for a given number."""
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, 3, self.size_px, self.size_px, generator=generator)

    def batches(self) -> list[Tensor]:
        """Return random batches of several sizes."""
        return [self.images(count) for count in _BATCHES]

    @property
    def mean(self) -> list[float]:
        """Mean of each channel of the training images, in [0, 1]."""
        return list(self.description.get("mean", (0.0, 0.0, 0.0)))

    @property
    def std(self) -> list[float]:
        """Deviation of each channel of the training images."""
        return list(self.description.get("std", (1.0, 1.0, 1.0)))


def open_exportable(path: Path) -> Exportable:
    """Load the network to export.

    Args:
        path: A run folder, whose encoder is taken, an encoder file, or a classifier file of a
            fine-tuned run.

    Raises:
        DataError: If it is not an encoder or a classifier that raysl wrote.
    """
    file = encoder_file(path)
    if read_header(file).get("format", "").startswith(_CLASSIFIER):
        return _open_classifier(file)
    description = read_description(file)
    config = described_backbone(description, where=file)
    encoder = load_encoder(file)
    assert isinstance(encoder, Backbone)
    return Exportable(
        encoder.requires_grad_(False),
        encoder,
        config,
        file,
        description,
        description.get("image_size_px", 224),
        encoder.embed_dim,
        "features",
    )


def _open_classifier(file: Path) -> Exportable:
    model = load_classifier(file)
    return Exportable(
        model.requires_grad_(False),
        model.encoder,
        described_backbone(model.description, where=file),
        file,
        model.description,
        model.description["image_size_px"],
        len(model.class_names),
        "logits",
    )


@torch.no_grad()
def largest_difference(exportable: Exportable, copy: Any) -> float:
    """Compare a copy with the network on random batches of several sizes.

    Args:
        exportable: The original.
        copy: Maps images to the same outputs as the original.

    Returns:
        The largest difference, relative to the largest number if that is above 1.

    Raises:
        ExportError: If a batch's result has another shape or is not finite.
    """
    largest = 0.0
    for images in exportable.batches():
        expected, result = exportable.model(images), copy(images)
        if result.shape != expected.shape:
            raise ExportError(
                f"gives {tuple(result.shape)} for {tuple(images.shape)}, not "
                f"{tuple(expected.shape)}"
            )
        difference = (result - expected).abs().max() / expected.abs().max().clamp(min=1)
        if not difference.isfinite():
            raise ExportError(f"gives numbers that are not finite for {tuple(images.shape)}")
        largest = max(largest, float(difference))
    return largest


def refuse_logits(exportable: Exportable, format_name: str) -> None:
    """Reject formats that only support an encoder.

    Raises:
        ConfigError: If it is a classifier.
    """
    if exportable.output == "logits":
        raise ConfigError(
            f"--format {format_name} holds an encoder, and {exportable.path} is a classifier; use "
            "--format onnx, torch_export, torchscript or mlflow, or export its encoder"
        )
