"""A network to export, in evaluation mode, with its metadata."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from raysl.encoder.file import described_backbone, encoder_file, load_encoder, read_description
from raysl.encoder.read import read_header
from raysl.errors import ConfigError, ExportError
from raysl.nn.backbones import Backbone, BackboneConfig
from raysl.nn.classifier import load_classifier

# Batch sizes on which a copy is compared; it is traced with one of them only.
TRACED_BATCH = 2
_BATCHES = (1, TRACED_BATCH, 5)
_CLASSIFIER = "raysl-classifier"


class Exportable(NamedTuple):
    """A network that maps images to features, or to logits."""

    model: nn.Module
    """``(N, 3, S, S)`` float32, normalised -> ``(N, width)`` float32; on the CPU."""
    backbone: Backbone
    """The encoder in ``model``."""
    config: BackboneConfig
    """The settings of the encoder."""
    path: Path
    """The file of the network."""
    description: dict[str, Any]
    """The description in the file's header."""
    size_px: int
    """Side S of the training images."""
    width: int
    """Number of features or logits."""
    output: Literal["features", "logits"]

    def example(self) -> Tensor:
        """Return random images for tracing the network."""
        return self.images(TRACED_BATCH)

    def images(self, count: int) -> Tensor:
        """Return ``count`` random images, the same for equal counts."""
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
        """Standard deviation of each channel of the training images."""
        return list(self.description.get("std", (1.0, 1.0, 1.0)))


def open_exportable(path: Path | str) -> Exportable:
    """Load the network to export.

    Args:
        path: An encoder file, a run folder that holds one, or the classifier file of a fine-tuned
            run; a path or an address in a store.

    Raises:
        DataError: If the file is not an encoder or a classifier that raysl wrote.
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
    """Return the largest difference of a copy's outputs, on random batches of several sizes.

    Args:
        exportable: The original.
        copy: Maps images to outputs, as the original does.

    Returns:
        The largest difference of a batch, relative to its largest output if that is above 1.

    Raises:
        ExportError: If the copy's outputs have another shape or are not finite.
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
    """Reject a classifier for a format that only supports encoders.

    Raises:
        ConfigError: If the network is a classifier.
    """
    if exportable.output == "logits":
        raise ConfigError(
            f"--format {format_name} supports encoders only; {exportable.path} is a classifier. "
            "Use --format onnx, torch_export, torchscript or mlflow, or export its encoder"
        )
